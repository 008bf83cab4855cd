"""Faults around Snakemake: locks, torn outputs, skewed clocks. What it does itself is held here, too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import Break, empty, half
from fault_world import ROOT

sys.path.insert(0, str(ROOT / "tests/workflow"))
from pipeline import Run

pytestmark = pytest.mark.workflow
ONE_METHOD = {"methods": ["additive"], "method_params": {}, "variants": {}, "method_seeds": {}, "studies": {}}
FOLD = "results/tiny/zero_shot/fold0"
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one method; every test leaves it finished."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.configure(**ONE_METHOD)
    run.snakemake("benchmark")
    return run


@pytest.fixture
def tables(run: Run) -> Iterator[dict[str, bytes]]:
    """Tables of the undisturbed run; the test must end with the same."""
    before = run.tables()
    yield before
    assert run.planned("--", "benchmark") == {}
    assert run.tables() == before


def lock(run: Run) -> Path:
    """A lock as a killed Snakemake leaves it."""
    locks = run.folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text(f"{(run.folder / 'results/tables').relative_to(run.folder)}\n")
    return locks


@pytest.mark.bad_input
def test_a_stale_lock_is_named_with_its_mend(run: Run, tables: dict[str, bytes]):
    lock(run)
    (run.folder / "results/tables.provenance.json").touch()
    said = run.snakemake("--force", "results/tables", check=False)
    assert "Directory cannot be locked" in said and "--unlock" in said
    run.snakemake("--unlock")
    run.snakemake("benchmark")


@pytest.mark.bad_input
def test_two_runs_of_one_folder_at_once(run: Run, tables: dict[str, bytes]):
    """The second is turned away before it does anything, the first ends as if alone."""
    first = subprocess.Popen(
        run.command("--forcerun", "prepare", "--", "benchmark"), cwd=run.folder, env=run.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    locks = run.folder / ".snakemake/locks"
    while not list(locks.glob("*")) and first.poll() is None:
        time.sleep(0.05)
    second = run.snakemake("benchmark", check=False)
    shown, _ = first.communicate(timeout=600)
    assert "Directory cannot be locked" in second and "--unlock" in second
    assert "wait" in second or "another Snakemake" in second or "other Snakemake" in second
    assert first.returncode == 0, shown[-3000:]


PREDICTION = f"{FOLD}/additive/seed0/prediction.h5ad"
SCORES = f"{FOLD}/additive/seed0/scores.parquet"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "reader", "change"),
    [(PREDICTION, "evaluate", empty), (PREDICTION, "evaluate", half), (SCORES, "summarise", empty)],
    ids=["prediction-empty", "prediction-half", "scores-empty"],
)
def test_a_torn_output_stops_the_run_and_its_deletion_mends_it(
    name: str, reader: str, change: Break, run: Run, tables: dict[str, bytes]
):
    """Snakemake takes a file that exists, of the time it had, as done; the stage that reads it does not."""
    change(run.folder / name)
    assert run.planned("--", "benchmark") == {}, "Snakemake itself saw it"
    said = run.snakemake("--show-failed-logs", "--forcerun", reader, "--", "benchmark", check=False)
    assert f"perturbed: {name}: has " in said and "delete" in said and f"Error in rule {reader}" in said
    (run.folder / name).unlink()
    run.snakemake("--", name, "benchmark")
    assert (run.folder / name).stat().st_size > 0


@pytest.mark.bad_input
@pytest.mark.parametrize("years", [-10, 10])
def test_a_skewed_clock(years: int, run: Run, tables: dict[str, bytes]):
    """An output dated far off: at worst what depends on it runs again, once, to the same result."""
    file = run.folder / f"{FOLD}/split.csv"
    then = time.time() + years * YEAR
    os.utime(file, (then, then))
    run.snakemake("benchmark")
