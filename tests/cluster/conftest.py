"""One Slurm and one undisturbed run for all tests of this folder, which only `make test-cluster` starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_run import ClusterRun
from loopback import Loopback, why_not


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nobody's machine gets a Slurm by the way: these tests run only where they are asked for by their marker."""
    if config.option.markexpr != "cluster":
        aside = pytest.mark.skip(reason="brings up a Slurm; run `make test-cluster` as root")
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(aside)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path_factory.mktemp("slurm"))
    reason = why_not() or loopback.claim()
    if reason:
        pytest.fail(reason, pytrace=False)  # asked for by its marker, it is not green where nothing ran
    try:
        loopback.start()
        yield loopback
    finally:
        loopback.stop()


@pytest.fixture(scope="session")
def reference(slurm: Loopback, tmp_path_factory: pytest.TempPathFactory) -> ClusterRun:
    """The undisturbed run: `snakemake --profile slurm` as typed in a fresh clone, whose config is that of the suite."""
    run = ClusterRun(tmp_path_factory.mktemp("reference") / "clone", slurm)
    run.clone()
    run.configure()
    run.begin(target="")
    run.finish()
    return run


@pytest.fixture
def run(slurm: Loopback, reference: ClusterRun, tmp_path) -> Iterator[ClusterRun]:
    """A copy of the undisturbed run that still has to fit, score and summarise."""
    copy = reference.copy_before_fit(tmp_path / "run")
    yield copy
    copy.end()
    slurm.wait_for_node()
