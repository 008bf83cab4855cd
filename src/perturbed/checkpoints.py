"""Checkpoints on disk: written whole, with a checksum, and with the one before kept in case the last is damaged.

torch is imported only where there is something to write or read.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perturbed.config import Section
from perturbed.files import atomic, sha256_text

if TYPE_CHECKING:
    from perturbed.models.base import TrainingData

log = logging.getLogger(__name__)


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last is kept."""
    return path.with_name(f"{path.name}.previous")


def write_checkpoint(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a checkpoint; what lay at `path` is kept as the previous one.

    Parameters
    ----------
    path
        The file.
    meta
        What is no tensor, as JSON can hold it.
    tensors
        Nested mappings and sequences of tensors and numbers; `meta` and `checksum` are taken as keys.
    """
    import torch

    text = json.dumps(meta)
    content = {**tensors, "meta": text, "checksum": _checksum([text, dict(tensors)])}
    with atomic(path) as part:
        torch.save(content, part)
        if path.is_file():
            os.replace(path, previous_of(path))


def read_checkpoint(path: Path, identity: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Meta and tensors of the newest usable checkpoint whose `meta["identity"]` is this one, or None.

    What cannot be used is said in one line, with the reason: files that are damaged, and those of another task.
    """
    found = [file for file in (path, previous_of(path)) if file.is_file()]
    for file in found:
        instead = "starting afresh" if file == found[-1] else "taking the one before"
        try:
            content = _read(file)
        except Exception as error:  # torch and zip raise many kinds for a broken file
            reason = " ".join(str(error).split())[:120]
            log.warning("%s: not a readable checkpoint (%s); %s", file, reason, instead)
            continue
        meta = json.loads(content.pop("meta"))
        if meta.get("identity") == identity:
            return meta, content
        log.warning("%s: checkpoint of other data or hyper-parameters; %s", file, instead)
    return None


def remove_checkpoints(path: Path) -> None:
    """Remove the checkpoint and the one before it, where they are."""
    for file in (path, previous_of(path)):
        file.unlink(missing_ok=True)


@contextmanager
def only_writer(path: Path | None) -> Iterator[None]:
    """Keep others from writing the checkpoint `path`, and what it leads to, while the body runs; wait until they end.

    After a scheduler or Snakemake died, a job that it started may still run when its successor begins. The lock is the
    system's (flock on a file beside `path`), so that nothing is left of it when a process dies. Where the file system
    has no locks there is none.
    """
    if path is None:
        yield
        return
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _lock(lock: Path) -> int:
    said = False
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # whoever held it has removed the file; then this lock keeps nobody out
                if os.fstat(handle).st_ino == lock.stat().st_ino:
                    return handle
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            if not said:
                log.warning("%s: another process is at this fit; waiting until it ends", lock)
            said = True
            time.sleep(1)
        except OSError as error:
            log.warning("%s: cannot be locked (%s); going on without", lock, error.strerror)
            return handle
        except BaseException:
            os.close(handle)
            raise


def _read(file: Path) -> dict[str, Any]:
    import torch

    content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    said = content.pop("checksum")
    if said != _checksum([content["meta"], {key: value for key, value in content.items() if key != "meta"}]):
        raise ValueError("its checksum is wrong")
    return content


def _checksum(value: Any, start: int = 0) -> int:
    """Crc32 of all values in order; torch's own reader does not look at the checksums of its archives."""
    import torch

    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy().data, zlib.crc32(f"{value.dtype}{list(value.shape)}".encode(), start))
    if isinstance(value, Mapping):
        for key in value:
            start = _checksum(value[key], zlib.crc32(repr(key).encode(), start))
        return start
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            start = _checksum(item, start)
        return start
    return zlib.crc32(repr(value).encode(), start)


def fingerprint(data: TrainingData, params: Section, seed: int) -> str:
    """Hash of all that determines a fit: data, hyper-parameters, seed and the version of torch."""
    import torch

    matrix = data.X
    if hasattr(matrix, "checksum"):  # on disk
        checks = [matrix.checksum(), checksum(data.is_val)]
    else:
        checks = [checksum(array) for array in (matrix.data, matrix.indices, matrix.indptr, data.is_val)]
    names = [sha256_text("\n".join(map(str, names))) for names in (data.perturbation, data.context, data.genes)]
    return sha256_text(json.dumps([checks, names, params.model_dump_json(), seed, torch.__version__]))


def checksum(array: np.ndarray) -> int:
    """crc32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).data)
