"""Killed in any stage, at the worst moment, the same command finishes with the tables of an undisturbed run."""

from __future__ import annotations

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


@pytest.mark.parametrize("signal", [2, 9], ids=["SIGINT", "SIGKILL"])
def test_every_stage_survives(signal: int, new_run: Run, finished_run: Run, tmp_path: Path):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(KILLER)
    for stage in STAGES:
        marker = tmp_path / f"killed-{stage}"
        env = {"PYTHONPATH": str(hooks), "KILL_VERB": stage, "KILL_MARKER": str(marker), "KILL_SIGNAL": str(signal)}
        target = "figures" if stage == "figure" else "benchmark"
        shown = new_run.snakemake(target, check=False, env=env)
        assert marker.exists(), f"{stage} never reached its output: {shown[-2000:]}"
        assert "Error in rule" in shown, f"{stage} was killed but the run went on"
    new_run.snakemake("benchmark")
    disturbed, undisturbed = new_run.tables(), finished_run.tables()
    assert [name for name in undisturbed if disturbed[name] != undisturbed[name]] == []
