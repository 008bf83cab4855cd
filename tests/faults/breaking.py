"""Ways to break a file: each takes the path of a copy and changes it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], None]


def keeping_time(change: Break) -> Break:
    """As a power cut does it: the time of the file is as before, so that no clock tells."""

    def changed(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


@keeping_time
def empty(path: Path) -> None:
    path.write_bytes(b"")


@keeping_time
def half(path: Path) -> None:
    """Half of the file; of a text, whole lines, which read as a shorter table."""
    data = path.read_bytes()
    middle = len(data) // 2
    try:
        data.decode()
        middle = data.index(b"\n", middle) + 1 if b"\n" in data[middle:-1] else middle
    except UnicodeDecodeError:
        pass
    path.write_bytes(data[:middle])


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 20)


def folder(path: Path) -> None:
    """What cannot be opened at all; permissions do not bind root."""
    path.unlink()
    path.mkdir()


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replaced(old: str, new: str) -> Break:
    """Other text in a text file, by whoever made it: no record speaks of it."""

    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text, f"{path} holds no {old!r}"
        path.write_text(text.replace(old, new))
        drop_record(path)

    return change


def written(text: str) -> Break:
    """Only this text, by whoever made it."""

    def change(path: Path) -> None:
        path.write_text(text)
        drop_record(path)

    return change


def as_json(change: Callable[[Any], Any]) -> Break:
    def changed(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        drop_record(path)

    return changed


def as_h5ad(change: Callable[[Any], Any]) -> Break:
    """Another AnnData: `change` alters it in place or returns a new one."""

    def changed(path: Path) -> None:
        import anndata

        adata = anndata.read_h5ad(path)
        result = change(adata)
        (adata if result is None else result).write_h5ad(path)
        drop_record(path)

    return changed


def as_csv(change: Callable[[Any], Any]) -> Break:
    def changed(path: Path) -> None:
        import pandas as pd

        change(pd.read_csv(path)).to_csv(path, index=False)
        drop_record(path)

    return changed


def as_parquet(change: Callable[[Any], Any]) -> Break:
    def changed(path: Path) -> None:
        import pandas as pd

        change(pd.read_parquet(path)).to_parquet(path, index=False)
        drop_record(path)

    return changed


def drop_record(path: Path) -> None:
    for place in (path, path.parent):
        place.with_name(f"{place.name}.provenance.json").unlink(missing_ok=True)
