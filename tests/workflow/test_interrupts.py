"""Killed in any stage, at the worst moment, the same command finishes with the tables of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from pipeline import Run

pytestmark = pytest.mark.workflow

STAGES = (
    "simulate",
    "prepare",
    "split",
    "features",
    "check-leakage",
    "fit",
    "predict",
    "evaluate",
    "summarise",
    "figure",
)
# Loaded by every Python of the run: ends the chosen stage when its output is written in full but not yet renamed.
KILLER = """
import os, signal, sys
verb, marker = os.environ.get("KILL_VERB"), os.environ.get("KILL_MARKER", "")
if verb and verb in sys.orig_argv[2:3]:
    replace = os.replace
    def dies(source, target, **options):
        if ".part." in str(source) and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), int(os.environ["KILL_SIGNAL"]))
        return replace(source, target, **options)
    os.replace = dies
"""


def killed(run: Run, stage: str, signal: int, hooks: Path, *targets: str) -> None:
    """Run until the stage is killed."""
    (hooks / "sitecustomize.py").write_text(KILLER)
    marker = hooks / f"killed-{stage}"
    env = {"PYTHONPATH": str(hooks), "KILL_VERB": stage, "KILL_MARKER": str(marker), "KILL_SIGNAL": str(signal)}
    shown = run.snakemake(*targets, check=False, env=env)
    assert marker.exists(), f"{stage} never reached its output: {shown[-2000:]}"
    assert "Error in rule" in shown, f"{stage} was killed but the run went on"


@pytest.mark.parametrize("signal", [2, 9], ids=["SIGINT", "SIGKILL"])
def test_every_stage_survives(signal: int, new_run: Run, finished_run: Run, tmp_path_factory: pytest.TempPathFactory):
    hooks = tmp_path_factory.mktemp("hooks")
    for stage in STAGES:
        killed(new_run, stage, signal, hooks, "figures" if stage == "figure" else "benchmark")
    new_run.snakemake("benchmark")
    disturbed, undisturbed = new_run.tables(), finished_run.tables()
    assert [name for name in undisturbed if disturbed[name] != undisturbed[name]] == []
    if signal == 2:
        assert not list(new_run.folder.glob("**/.part.*"))


@pytest.mark.parametrize("signal", [2, 9], ids=["SIGINT", "SIGKILL"])
def test_fetch_survives(signal: int, new_run: Run, finished_run: Run, tmp_path_factory: pytest.TempPathFactory):
    hooks = tmp_path_factory.mktemp("hooks")
    source = finished_run.folder / "data/tiny/raw.h5ad"
    (new_run.folder / "copied.yaml").write_text(f"source: {{kind: path, path: {source}}}\n")
    new_run.configure(dataset="copied", cards=[str(new_run.folder)])
    killed(new_run, "fetch", signal, hooks, "data/copied/raw.h5ad")
    new_run.snakemake("data/copied/raw.h5ad")
    first = (new_run.folder / "data/copied/raw.h5ad").read_bytes()
    new_run.snakemake("data/copied/raw.h5ad", "--force")
    assert (new_run.folder / "data/copied/raw.h5ad").read_bytes() == first


def test_a_killed_snakemake_goes_on_where_it_stopped(new_run: Run, finished_run: Run):
    """kill -9 of Snakemake itself leaves its lock; the message says how to lift it, and then the run goes on."""
    process = subprocess.Popen(
        new_run.command("benchmark"), cwd=new_run.folder, env=new_run.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    first_fit = new_run.folder / "results/tiny/zero_shot/fold0"
    deadline = time.monotonic() + 300
    while not list(first_fit.glob("*/seed0/model")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, 9)
    process.wait()
    assert list(first_fit.glob("*/seed0/model")), "no fit was ever finished"
    assert "--unlock" in new_run.snakemake("benchmark", check=False)
    new_run.snakemake("--unlock")
    new_run.snakemake("benchmark")
    disturbed, undisturbed = new_run.tables(), finished_run.tables()
    assert [name for name in undisturbed if disturbed[name] != undisturbed[name]] == []
