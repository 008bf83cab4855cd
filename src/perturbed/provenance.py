"""A record beside every result: what made it, from what, with which versions, how long and how much memory it took."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perturbed.errors import DataError
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
    output = output if output.name else output.absolute()  # `.`, the folder at hand
    return output.with_name(f"{output.name}.provenance.json")


@contextmanager
def recorded(
    verb: str,
    output: str | Path,
    inputs: Mapping[str, str | Path | None],
    settings: Mapping[str, Any],
    *,
    read: Sequence[str | Path] = (),
    beside: Sequence[str | Path | None] = (),
) -> Iterator[dict[str, Any]]:
    """Time the body and write its record when it succeeds; the body may add keys such as `device`.

    `inputs` and `read`, which are not described one by one, are first held against their own records (`check_whole`).
    Each of `beside`, what the body writes beside `output`, gets a record, too. While the body runs the records of an
    earlier run are set aside: were it killed, they would speak of another file.

    Raises
    ------
    DataError
        If an input is not what it was when it was made.
    """
    check_whole(*(path for path in inputs.values() if path is not None), *read)
    outputs = [output, *(path for path in beside if path is not None)]
    extra: dict[str, Any] = {}
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    with _set_aside([record_path(path) for path in outputs]):
        yield extra
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "verb": verb,
        "command": sys.argv,
        "settings": dict(settings),
        "inputs": {name: _describe(path) for name, path in inputs.items() if path is not None},
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.monotonic() - clock, 3),
        "peak_memory_mb": round(peak_kib / 1024, 1),
        "machine": {"system": platform.platform(), "cpu": platform.machine(), "python": platform.python_version()},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git_commit(),
        **extra,
    }
    for path in filter(lambda path: Path(path).exists() or path == output, outputs):
        write_json(record_path(path), {**record, "output": {**_describe(path), **_measure(Path(path))}})


@contextmanager
def _set_aside(records: Sequence[Path]) -> Iterator[None]:
    """Give records the temporary name that `write_json` clears away; bring them back if the body fails."""
    aside = {record: record.with_name(f".part.{record.name}") for record in records if record.is_file()}
    for record, name in aside.items():
        os.replace(record, name)
    try:
        yield
    except BaseException:
        for record, name in aside.items():
            os.replace(name, record)
        raise


def check_whole(*paths: str | Path) -> None:
    """Refuse files, and folders with files, that are not as long as when they were made.

    A power cut, a full disk under a copy or a broken transfer leaves files that are empty or end in the middle. Half a
    csv or GMT reads as a shorter one, so the sizes in the records are compared. What has no record (a user's own file)
    or is missing (its reader says so) is passed over.

    Raises
    ------
    DataError
        Names the first such file, both sizes and the mend.
    """
    for path in map(Path, paths):
        if not path.exists() or not path.absolute().name:
            continue
        own, of_folder = _read_output(record_path(path)), _read_parent(path)
        if path.is_dir():
            for name, size in own.get("files", {}).items():
                _check_size(path / name, size, path)
        elif path.is_file():
            _check_size(path, own.get("bytes"), path)
            _check_size(path, of_folder.get("files", {}).get(path.name), path.absolute().parent)


def _check_size(path: Path, size: int | None, output: Path) -> None:
    found = path.stat().st_size if path.is_file() else None
    if size is None or found == size:
        return
    is_now = "is missing" if found is None else f"has {found:,} bytes"
    raise DataError(
        f"{path}: {is_now}, but had {size:,} when it was made; delete {output.name} and rerun the stage that makes it "
        f"(or, if you changed it on purpose, delete {record_path(output).name})"
    )


def _measure(path: Path) -> dict[str, Any]:
    """Size of a file, or of every file of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {"files": {str(file.relative_to(path)): file.stat().st_size for file in files}}
    return {"bytes": path.stat().st_size} if path.is_file() else {}


def _read_output(record: Path) -> dict[str, Any]:
    """What a record says of its output; nothing where it is missing or broken."""
    try:
        output = json.loads(record.read_text(encoding="utf-8"))["output"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return output if isinstance(output, dict) else {}


def _read_parent(path: Path) -> dict[str, Any]:
    """What the record of the folder of a file says; nothing where that is the root."""
    folder = path.absolute().parent
    return _read_output(record_path(folder)) if folder.name else {}


def _describe(path: str | Path) -> dict[str, Any]:
    """Path and sha256; taken from the record beside the file where that is as new, so that it is computed once."""
    path = Path(path)
    if not path.is_file():
        return {"path": str(path)}
    beside = record_path(path)
    if beside.is_file() and beside.stat().st_mtime >= path.stat().st_mtime:
        known = _read_output(beside).get("sha256")
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
