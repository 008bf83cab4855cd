"""Faults around Snakemake: locks, torn outputs, skewed clocks. What it does itself is held here, too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import Break, empty, half
from fault_world import ROOT
from test_kill_points import killed_before

sys.path.insert(0, str(ROOT / "tests/workflow"))
from pipeline import Run

pytestmark = pytest.mark.workflow
ONE_METHOD = {"methods": ["additive"], "method_params": {}, "variants": {}, "method_seeds": {}, "studies": {}}
FOLD = "results/tiny/zero_shot/fold0"
FIT = f"{FOLD}/additive/seed0"
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one method; every test leaves it finished."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.configure(**ONE_METHOD)
    run.snakemake()
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


PRODUCTS: dict[str, Break] = {
    "results/report.html": half,
    "results/config.yaml": half,
    "results/figures/overview.svg": empty,
    "results/figures/overview.png": half,
    "results/figures/tiny/zero_shot/strata.csv": half,
}
"""What is at the end of its chain, so that no verb reads it and refuses it."""
BETWEEN: dict[str, Break] = {
    "data/tiny/raw.h5ad": half,
    "data/tiny/prepared.h5ad": empty,
    f"{FOLD}/split.csv": half,
    f"{FOLD}/features.csv": empty,
    f"{FOLD}/leakage.json": half,
    f"{FOLD}/references.parquet": half,
    f"{FIT}/model/state.npz": half,
    f"{FIT}/training.csv": empty,
    f"{FIT}/prediction.h5ad": half,
    f"{FIT}/details/deltas.parquet": half,
    f"{FIT}/scores.parquet": empty,
}
"""What is read on the way to the tables."""
TABLES = {"results/tables/summary.csv": half}


def tear(run: Run, changes: dict[str, Break]) -> dict[str, bytes]:
    """Break files; return what they held."""
    before = {name: (run.folder / name).read_bytes() for name in changes}
    for name, change in changes.items():
        change(run.folder / name)
    return before


def differing(run: Run, before: dict[str, bytes]) -> list[str]:
    """Files that do not hold what they held, but for the times that a report shows."""
    now = {name: (run.folder / name).read_bytes() for name in before}
    return [name for name in before if timeless(name, now[name]) != timeless(name, before[name])]


def timeless(name: str, data: bytes) -> bytes:
    return re.sub(rb"[\d.]+", b"", data) if name.endswith(".html") else data


@pytest.mark.bad_input
@pytest.mark.parametrize("changes", [PRODUCTS, TABLES], ids=["products", "tables"])
def test_a_torn_product_is_made_again(changes: dict[str, Break], run: Run, tables: dict[str, bytes]):
    """Snakemake takes a file that exists as done, so the next plain run sets aside what is shorter than it was."""
    before = tear(run, changes)
    said = run.snakemake("--dry-run")
    for name in changes:
        assert re.search(rf"^perturbed: {name}: has [\d,]+ bytes, but had .* no dry run", said, flags=re.MULTILINE)
    assert not list(run.folder.rglob("*.torn")), "a dry run changed something"
    said = run.snakemake()
    for name in changes:
        assert re.search(rf"^perturbed: {name}: has .*kept as \S+\.torn, and made anew", said, flags=re.MULTILINE)
    assert differing(run, before) == []
    kept = sorted(run.folder.rglob("*.torn"))
    assert len(kept) == len(changes)
    for path in kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "Nothing to be done" in run.snakemake()


@pytest.mark.bad_input
def test_what_is_torn_on_the_way_is_made_again_when_it_is_needed(run: Run, tables: dict[str, bytes]):
    """What was made of it before it tore stands, so that a plain run only sets it aside."""
    before = tear(run, BETWEEN)
    said = run.snakemake("--", "benchmark")
    assert "Nothing to be done" in said
    for name in BETWEEN:
        assert re.search(rf"^perturbed: {name}: has .*made anew where it is needed", said, flags=re.MULTILINE), name
    run.snakemake("--forcerun", "summarise", "--", "benchmark")
    assert differing(run, before) == []
    for path in run.folder.rglob("*.torn"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.bad_input
def test_nothing_is_set_aside_under_a_run_that_holds_the_lock(run: Run, tables: dict[str, bytes]):
    before = tear(run, {f"{FOLD}/leakage.json": half})
    lock(run)
    said = run.snakemake("--", "benchmark", check=False)
    assert "leakage.json: has" in said and not list(run.folder.rglob("*.torn"))
    run.snakemake("--unlock")
    run.snakemake("--", f"{FOLD}/leakage.json", "benchmark")
    assert differing(run, before) == []
    (run.folder / f"{FOLD}/leakage.json.torn").unlink()


@pytest.mark.kill_point
def test_killed_while_it_writes_the_report(run: Run, tables: dict[str, bytes]):
    """The report that was there stands until the new one is whole."""
    before = {"results/report.html": (run.folder / "results/report.html").read_bytes()}
    figures = [str(path.relative_to(run.folder)) for path in sorted(run.folder.glob("results/figures/**/*.svg"))]
    command = ["report", *figures, "--snakefile", str(ROOT / "Snakefile"), "--config", "results/config.yaml"]
    killed_before("report.html", [*command, "--out", "results/report.html"], run.folder)
    assert differing(run, before) == []
    assert (run.folder / "results/.part.report.html").is_file(), "the test killed before anything was written"
    run.snakemake("--forcerun", "report")
    assert differing(run, before) == [] and not list(run.folder.rglob(".part.*"))


@pytest.mark.bad_input
@pytest.mark.parametrize("years", [-10, 10])
@pytest.mark.parametrize("name", [f"{FOLD}/split.csv", f"{FIT}/model/.snakemake_timestamp"], ids=["file", "folder"])
def test_a_skewed_clock(name: str, years: int, run: Run, tables: dict[str, bytes]):
    """An output dated far off: at worst what depends on it runs again, once, to the same result."""
    file, large = run.folder / name, ("--max-checksum-file-size", "1")  # as if it were too large for a checksum
    then = time.time() + years * YEAR
    os.utime(file, (then, then))
    said = run.snakemake("--dry-run", *large, "--", "benchmark")
    assert ("dated in the future" in said) == (years > 0) and file.stat().st_mtime == pytest.approx(then)
    run.snakemake(*large, "--", "benchmark")
    assert "Nothing to be done" in run.snakemake(*large, "--", "benchmark")
