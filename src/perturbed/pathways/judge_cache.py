"""Answers of the judge on disk: one JSON object a line, appended and synced as each arrives, found by what was asked.

The key of an answer is the hash of everything that shapes it: question, model, temperature, longest answer, seed,
further fields, number of the vote and the version of this scheme. The same question of another list is the same line.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from perturbed.errors import DataError
from perturbed.files import sha256_text
from perturbed.pathways.judge_spec import JudgeSpec

SCHEMA_VERSION = 1
"""Raise it when what is asked or how an answer is read changes: kept answers then no longer count."""
STATUSES = ("answer", "refusal", "malformed")


def answer_key(spec: JudgeSpec, messages: list[dict[str, str]], vote: int) -> str:
    """Hex sha256 of what is asked; the server's address and how often it is asked are no part of it."""
    asked = {
        "schema": SCHEMA_VERSION,
        "model": spec.model,
        "messages": messages,
        "temperature": spec.temperature,
        "max_tokens": spec.max_tokens,
        "seed": spec.seed if spec.send_seed else None,
        "extra": spec.extra,
        "vote": vote,
    }
    return sha256_text(json.dumps(asked, sort_keys=True, ensure_ascii=False))


class AnswerCache:
    """The answers of a file, and the door through which new ones go to it.

    Parameters
    ----------
    path
        The file; it need not exist. None keeps answers in memory only.
    writable
        Open it for appending, alone: a second writer is refused.

    Raises
    ------
    DataError
        If a line other than a torn last one is broken, or another process writes the file.
    """

    def __init__(self, path: str | Path | None, *, writable: bool) -> None:
        self.path = None if path is None else Path(path)
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._handle: TextIO | None = None
        if self.path is None:
            return
        if writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self.path, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)
            _claim(self._handle, self.path)
        for record in _read(self.path, self._handle):
            self._answers.setdefault(record["key"], []).append(record)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """What came back for a question so far, oldest first."""
        with self._lock:
            return list(self._answers.get(key, ()))

    def add(self, record: dict[str, Any]) -> None:
        """Keep what came back: on disk before this returns."""
        line = json.dumps(record, sort_keys=True, ensure_ascii=False)
        with self._lock:
            if self._handle is not None:
                self._handle.write(line + "\n")
                self._handle.flush()
                os.fsync(self._handle.fileno())
            # As a reader of the file will see it, so that a first and a later run say the same.
            self._answers.setdefault(record["key"], []).append(json.loads(line))

    def close(self) -> None:
        """Let the file go."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def final(attempts: list[dict[str, Any]], malformed_retries: int) -> dict[str, Any] | None:
    """The attempt that counts as the vote, or None where the question is to be asked (again).

    The first answer or refusal counts; without one, the last of `1 + malformed_retries` malformed ones, which makes the
    vote invalid.
    """
    for record in attempts:
        if record["status"] != "malformed":
            return record
    return attempts[malformed_retries] if len(attempts) > malformed_retries else None


def _claim(handle: TextIO, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise DataError(
            f"{path}: another `perturbed judge` writes to it; wait for it, or give each a --cache"
        ) from None
    except OSError:  # a file system without locks
        pass


def _read(path: Path, handle: TextIO | None) -> Iterable[dict[str, Any]]:
    """Records of the file; the torn last line of a killed writer is left out, and cut off where we may write."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of kept answers; correct `replay`") from None
    whole = data.rfind(b"\n") + 1
    if handle is not None and whole < len(data):
        os.ftruncate(handle.fileno(), whole)
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        if line.strip():
            yield _check(line, f"{path}: line {number}")


def _check(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        raise DataError(f"{where} is no JSON; mend or remove that line") from None
    if not isinstance(record, dict) or not isinstance(record.get("key"), str) or record.get("status") not in STATUSES:
        raise DataError(f"{where} is no answer of a judge (key and status are missing); is this the --cache of a run?")
    if record["status"] == "answer" and record.get("relevant") not in ("yes", "no"):
        raise DataError(f"{where}: relevant is {record.get('relevant')!r}, not yes or no")
    return record
