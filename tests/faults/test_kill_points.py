"""kill -9 of every verb at the worst moment: nothing half-written counts, and the same command then ends as ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_world import ROOT, STAGES, invoke, snapshot

from perturbed.files import hash_file

DYING = Path(__file__).with_name("dying.py")
LATER = {
    "simulate": ("truth.h5ad", "planted.gmt", "raw.h5ad.provenance.json"),
    "fit": ("training.csv", "model.provenance.json"),
    "predict": ("cells.h5ad",),
    "evaluate": ("embedding.csv", "deltas.parquet"),
    "figure": ("overview.csv",),
    "census simulate": ("truth.csv", "islets.gmt"),
    "gene-sets": ("sets.mapping.csv",),
}
"""Further moments of stages that write several outputs, some of them already there."""
POINTS = [(stage, Path(STAGES[stage].outputs[0]).name) for stage in STAGES]
POINTS += [(stage, name) for stage, names in LATER.items() for name in names]
NOT_BYTES = {"census simulate": ("store",)}
"""The store of TileDB names its files by the time of writing; what is read from it is compared by `census query`."""


def killed_before(name: str, arguments: list[str], folder: Path = ROOT) -> None:
    call = [sys.executable, str(DYING), name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, f"never reached {name}: {done.stderr[-2000:]}"


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".part.*"))


@pytest.mark.kill_point
@pytest.mark.parametrize(("stage", "name"), POINTS, ids=[f"{stage}-{name}" for stage, name in POINTS])
def test_killed_while_it_writes(stage: str, name: str, world: Path, tmp_path: Path):
    command, out = STAGES[stage].arguments(world, tmp_path), tmp_path
    killed_before(name, command)
    assert not list(out.rglob(name)), "what was not finished has its final name"
    assert parts(out), "the test killed before anything was written"
    done = invoke(command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert parts(out) == [], "the rerun left what the killed process had begun"
    for output in STAGES[stage].outputs:
        if output not in NOT_BYTES.get(stage, ()):
            assert content(out / output) == content(world / output), output


def content(path: Path) -> dict[str, bytes]:
    return snapshot(path) if path.is_dir() else {path.name: path.read_bytes()}


@pytest.mark.kill_point
@pytest.mark.parametrize("name", ["cells.bin", "SHA256SUMS", "manifest.json"])
def test_killed_while_it_mirrors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a mirror holds is never half of it, and the same command completes it."""
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")
    (tmp_path / "served.bin").write_bytes(bytes(range(256)) * 500)
    file = {"name": "cells.bin", "urls": [(tmp_path / "served.bin").as_uri()]}
    file["sha256"] = hash_file(tmp_path / "served.bin")
    (tmp_path / "far.yaml").write_text(json.dumps({"source": {"kind": "url", "files": [file]}}))
    methods = ["no_change", "mean_effect"]
    statistics = {"primary_method": methods[1], "primary_baseline": methods[0], "baselines": methods[:1]}
    run = {"dataset": ["far"], "cards": [str(tmp_path)], "methods": methods, "statistics": statistics}
    (tmp_path / "run.yaml").write_text(json.dumps({**run, "data": str(tmp_path / "data")}))
    command = ["mirror", "--config", str(tmp_path / "run.yaml"), "--no-progress", "--dir"]
    out, undisturbed = tmp_path / "mirror", tmp_path / "undisturbed"
    killed_before(name, [*command, str(out)])
    assert not (out / name).exists()
    for folder in (out, undisturbed):
        done = invoke([*command, str(folder)])
        assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(content(out)) == sorted(content(undisturbed)), "the killed process left something"
    for kept in ("cells.bin", "SHA256SUMS"):
        assert (out / kept).read_bytes() == (undisturbed / kept).read_bytes()
