"""A full disk, a folder that cannot be written: one line, nothing half-written, and then the same command ends."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_world import ROOT, STAGES, invoke, snapshot

NEEDS_ROOT = "needs root, to mount a small or read-only file system"
WRITING = ("simulate", "prepare", "split", "fit additive", "fit", "predict", "evaluate", "summarise", "figure",
           "census query", "enrich")  # fmt: skip


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a file system of 8 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(call, capture_output=True).returncode != 0:
        pytest.skip(NEEDS_ROOT)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def as_process(stage: str, world: Path, out: Path, **options: Any) -> str:
    """Run a stage in a process of its own, since HDF5 does not get over a full disk; return its one line."""
    call = [sys.executable, "-m", "perturbed.cli", *STAGES[stage].arguments(world, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("perturbed: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr and "ignored in" not in done.stderr, done.stderr[-3000:]
    assert not list(out.rglob(".part.*"))
    return lines[0]


def finishes(stage: str, world: Path, out: Path) -> None:
    done = invoke(STAGES[stage].arguments(world, out))
    assert done.exit_code == 0, (done.output, done.exception)
    assert not list(out.rglob(".part.*"))
    for output in STAGES[stage].outputs:
        same = snapshot if (world / output).is_dir() else Path.read_bytes
        assert same(out / output) == same(world / output), output


@pytest.mark.bad_input
@pytest.mark.parametrize("stage", WRITING)
def test_a_full_disk(stage: str, world: Path, mounted: Path):
    line = as_process(stage, world, mounted)
    assert "no space left on" in line.lower() and "free some" in line
    remount(mounted, "size=64m")
    finishes(stage, world, mounted)


@pytest.mark.bad_input
@pytest.mark.parametrize("stage", WRITING)
def test_a_folder_that_cannot_be_written(stage: str, world: Path, mounted: Path):
    """Read-only as a whole, which binds root, too."""
    remount(mounted, "ro")
    line = as_process(stage, world, mounted)
    assert "Read-only file system" in line and str(mounted) in line
    assert "give another path" in line or "check the folder" in line
    remount(mounted, "rw,size=64m")
    finishes(stage, world, mounted)


@pytest.mark.bad_input
@pytest.mark.parametrize("stage", ["prepare", "fit additive", "evaluate", "summarise"])
def test_a_file_size_limit(stage: str, world: Path, tmp_path: Path):
    """A quota: what no root is needed for."""
    limit = (1024, 1024)
    line = as_process(stage, world, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert "File too large" in line and "free some space and run the same command again" in line
    assert not (tmp_path / STAGES[stage].outputs[0]).exists()
    finishes(stage, world, tmp_path)
