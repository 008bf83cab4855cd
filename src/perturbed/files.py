"""Files that are either whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any failure it is removed.

    The temporary name ends as `path` does, so that writers which look at the suffix behave the same.
    Works for files and for folders (the caller may `mkdir` the yielded path). An existing `path` is
    replaced only when the new one is complete and on the disk, so that a power cut leaves one or the
    other. The name is the same every time, so that what a killed process left is removed by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")
    _remove(part)
    try:
        yield part
        _sync(part)
        if part.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    except BaseException:
        _remove(part)
        raise
    _sync_folder(path.parent)


def _sync(path: Path) -> None:
    """Put a file, or a folder with all that is in it, on the disk: the name must not outlive the content."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_dir():
            _sync_folder(file)
        elif file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sha256_text(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()
