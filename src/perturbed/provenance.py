"""A record beside every result: what made it, from what, with which versions, how long and how much memory it took."""

from __future__ import annotations

import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perturbed.files import hash_file, write_json

PACKAGES = (
    "perturbed",
    "anndata",
    "cellxgene-census",
    "gseapy",
    "numpy",
    "pandas",
    "scanpy",
    "scikit-learn",
    "scipy",
    "scvi-tools",
    "snakemake",
    "tiledbsoma",
    "torch",
)


def record_path(output: str | Path) -> Path:
    """Where the record of `output` lies: `scores.parquet` has `scores.parquet.provenance.json` beside it."""
    output = Path(output)
    return output.with_name(f"{output.name}.provenance.json")


@contextmanager
def recorded(
    verb: str, output: str | Path, inputs: Mapping[str, str | Path | None], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Time the body and write its record when it succeeds; the body may add keys such as `device`."""
    extra: dict[str, Any] = {}
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    yield extra
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "verb": verb,
        "command": sys.argv,
        "settings": dict(settings),
        "inputs": {name: _describe(path) for name, path in inputs.items() if path is not None},
        "output": _describe(output),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.monotonic() - clock, 3),
        "peak_memory_mb": round(peak_kib / 1024, 1),
        "machine": {"system": platform.platform(), "cpu": platform.machine(), "python": platform.python_version()},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git_commit(),
        **extra,
    }
    write_json(record_path(output), record)


def _describe(path: str | Path) -> dict[str, Any]:
    """Path and sha256; taken from the record beside the file where that is as new, so that it is computed once."""
    path = Path(path)
    if not path.is_file():
        return {"path": str(path)}
    beside = record_path(path)
    if beside.is_file() and beside.stat().st_mtime >= path.stat().st_mtime:
        known = json.loads(beside.read_text()).get("output", {}).get("sha256")
        if known:
            return {"path": str(path), "sha256": known}
    return {"path": str(path), "sha256": hash_file(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout, with `+changes` where tracked files differ from it; None outside of one."""
    folder = Path(__file__).parent
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
