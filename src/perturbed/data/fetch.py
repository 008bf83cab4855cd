"""Get the files of a card, each checked against its pinned size and hash, and write `raw.h5ad`."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from perturbed.data.archives import extract_member, hash_member
from perturbed.data.cards import Card, PathSource, RemoteFile, SimulationSource, UrlSource
from perturbed.data.download import Refused, download, write_problem
from perturbed.data.raw import check_raw, write_raw
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.files import atomic, hash_file, write_json

ALLOW_LOCALHOST = "PERTURBED_ALLOW_LOCALHOST"
"""Environment variable that, set to 1, accepts http://localhost and file:// addresses: for tests, not for data."""


STATE = ".fetch"
"""Folder beside the downloads with what is known of them, and with locks."""


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file that was checked before; kept beside it, so that its hash is computed once."""

    path: str
    size: int
    mtime_ns: int
    hashes: dict[str, str]
    origin: str = ""
    date: str = ""


# --- a data set ---------------------------------------------------------------------------------------------------


def fetch(
    card: Card,
    name: str,
    out: str | Path,
    *,
    data_dir: str | Path,
    mirror: str | Path | None = None,
    allow_unpinned: bool = False,
) -> None:
    """Get the files of a data set and write them as `raw.h5ad`, values untouched.

    Parameters
    ----------
    card
        The data set's card, of kind `url` or `path`.
    name
        Its name.
    out
        The `raw.h5ad` to write; `uns["provenance"]` holds origin and sha256 of every source file as JSON.
    data_dir
        Downloads are kept in `downloads` below it, one copy for all data sets.
    mirror
        Folder looked in first, by name and hash.
    allow_unpinned
        Accept files whose hash nobody has pinned.

    Raises
    ------
    PerturbedError
        For simulated data, if a file cannot be had or written, is broken, or is not what the card expects.
    """
    out, source = Path(out), card.source
    if isinstance(source, SimulationSource):
        raise ConfigError(f"{name}: source.kind is simulation, so there is nothing to fetch; use `perturbed simulate`")
    if isinstance(source, PathSource):
        paths = [find_source(source, name)]
        files = [{"path": source.path, "sha256": hash_file(paths[0])}]
    else:
        folder = Path(data_dir) / "downloads"
        near = None if mirror is None else Path(mirror)
        paths = [fetch_file(file, folder, mirror=near, allow_unpinned=allow_unpinned) for file in source.files]
        files = [_describe(file, folder) for file in source.files]
    provenance = json.dumps({"dataset": name, "kind": source.kind, "files": files}, sort_keys=True)
    try:
        with atomic(out) as part:
            files_of = source.files if isinstance(source, UrlSource) else ()
            write_raw(paths, part, provenance, name, files_of)
            check_raw(part, card, name)
    except OSError as error:
        raise FetchError(write_problem(out, error)) from None


def find_source(source: PathSource, name: str) -> Path:
    """The file of a `path` source, relative to the working folder."""
    path = Path(source.path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{name}: source.path: {path}: {what} (from {Path.cwd()}); correct the path in the card")
    return path


def _describe(file: RemoteFile, folder: Path) -> dict[str, Any]:
    """A file's entry in the provenance; its date is that of the download, so that a rerun writes the same bytes."""
    record = read_record(folder, file.name)
    entry: dict[str, Any] = {"name": file.name, "urls": list(file.urls)}
    if record is not None:
        entry |= {"sha256": record.hashes.get("sha256"), "bytes": record.size}
        entry |= {"origin": record.origin, "date": record.date}
    if file.member is not None:
        entry |= {"member": file.member, "member_sha256": file.member_sha256}
    return entry


# --- one file -----------------------------------------------------------------------------------------------------


def fetch_file(
    file: RemoteFile,
    folder: str | Path,
    *,
    mirror: Path | None = None,
    allow_unpinned: bool = False,
    allow_insecure: bool = False,
    progress: bool = True,
) -> Path:
    """Get one file: what lies in `folder` already, else from `mirror`, else from its addresses in order.

    Parameters
    ----------
    file
        What is wanted; with `member`, the file inside of the archive.
    folder
        Where downloads are kept. A partial download lies there as `NAME.part` and is gone on with.
    mirror
        Folder with files of the same names; used in place, if size and hash are right.
    allow_unpinned
        Accept a file without sha256, md5 or member_sha256; its sha256 is printed to be pinned.
    allow_insecure
        Accept `http://localhost` and `file://` addresses.
    progress
        Draw a progress bar on stderr.

    Returns
    -------
    Path
        The checked file, in `folder` or in `mirror`; for a member, the unpacked file in `folder`.

    Raises
    ------
    FetchError
        If no address gives the right file (one line with the reason of each), or it cannot be written.
    """
    folder = Path(folder)
    target = folder / f"{PurePosixPath(file.name).stem}.{PurePosixPath(file.member or '').name}"
    if file.member_sha256 is not None and target.is_file():
        if hashed(target, folder, ("sha256",)).hashes["sha256"] == file.member_sha256:
            return target
        say(f"{target}: not the pinned member; it is unpacked anew")
    whole = obtain(file, folder, mirror, allow_unpinned, allow_insecure or localhost_allowed(), progress)
    if file.member is None:
        return whole
    with _locked(folder, target.name):
        try:
            return extract_member(whole, file.member, target, sha256=file.member_sha256)
        except OSError as error:
            raise FetchError(write_problem(target, error)) from None


def localhost_allowed() -> bool:
    """Whether addresses of this machine are accepted."""
    return os.environ.get(ALLOW_LOCALHOST) == "1"


def obtain(
    file: RemoteFile, folder: Path, mirror: Path | None, allow_unpinned: bool, allow_insecure: bool, progress: bool
) -> Path:
    """The checked file as it is published, so the archive where it is a member that is wanted."""
    pinned = bool(file.sha256 or file.md5 or file.member_sha256)
    if not pinned and not allow_unpinned:
        raise FetchError(
            f"{file.name}: the card pins no hash (sha256, md5 or member_sha256); pin it, or set `allow_unpinned: true` "
            "to accept what comes and have its sha256 printed"
        )
    if mirror is not None and not mirror.is_dir():
        raise FetchError(f"mirror: {mirror}: no such folder; correct the path, or leave it out to download")
    with _locked(folder, file.name):
        path, origin = _kept(file, folder), ""
        if path is None and mirror is not None:
            path, origin = _mirrored(file, folder, mirror), f"mirror {mirror}"
        if path is None:
            path, origin = _downloaded(file, folder, pinned, allow_insecure, progress)
        record = hashed(path, folder, ("sha256",), origin)
        if not pinned:
            say(f"{file.name} is not pinned; to pin it, add to the card: sha256: {record.hashes['sha256']}")
    return path


def _kept(file: RemoteFile, folder: Path) -> Path | None:
    path = folder / file.name
    if not path.is_file():
        return None
    problem = _mismatch(path, file, folder)
    if problem is None:
        return path
    say(f"{path}: {problem}; it is fetched anew")
    path.unlink()
    return None


def _mirrored(file: RemoteFile, folder: Path, mirror: Path) -> Path | None:
    path = mirror / file.name
    if not path.is_file():
        say(f"{file.name}: not in the mirror {mirror}; its addresses are tried")
        return None
    problem = _mismatch(path, file, folder)
    if problem is None:
        return path
    say(f"{path}: {problem}; its addresses are tried")
    return None


def _downloaded(file: RemoteFile, folder: Path, pinned: bool, allow_insecure: bool, progress: bool) -> tuple[Path, str]:
    part, reasons = folder / f"{file.name}.part", []
    for url in file.urls:
        if not pinned:
            part.unlink(missing_ok=True)  # without a hash nothing would tell halves of two versions
        # A resumed file with a wrong hash may have had a bad beginning; that is no fault of this address.
        for resumed in (part.exists(), False):
            try:
                download(url, part, size=file.bytes, allow_insecure=allow_insecure, progress=progress)
            except Refused as refused:
                reasons.append(f"{url}: {refused}")
                break
            problem = _mismatch(part, file, folder)
            if problem is None:
                target = folder / file.name
                os.replace(part, target)
                return target, url
            part.unlink()
            if not resumed:
                reasons.append(f"{url}: {problem}")
                break
    advice = "try again, add an address to the card, or put the file into a folder and give it as `mirror`"
    raise FetchError(f"{file.name}: no source gave the file: {'; '.join(reasons)}; {advice}")


def _mismatch(path: Path, file: RemoteFile, folder: Path) -> str | None:
    """Why `path` is not the pinned file, or None."""
    size = path.stat().st_size
    if size == 0:
        return "empty file"
    if file.bytes is not None and size != file.bytes:
        return f"{size:,} bytes, expected {file.bytes:,}"
    for algorithm, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None:
            found = hashed(path, folder, (algorithm,)).hashes[algorithm]
            return None if found == expected else f"{algorithm} {found}, expected {expected}"
    if file.member is not None and file.member_sha256 is not None:
        try:
            found = hash_member(path, file.member)
        except DataError as error:
            return str(error).partition(": ")[2]
        return None if found == file.member_sha256 else f"member sha256 {found}, expected {file.member_sha256}"
    return None


# --- records and locks --------------------------------------------------------------------------------------------


def hashed(path: Path, folder: Path, algorithms: tuple[str, ...], origin: str = "") -> FileRecord:
    """The record of `path` with these hashes, computed only where size or time of change differ from the record's."""
    name, stat = path.name.removesuffix(".part"), path.stat()
    now = (str(path.with_name(name)), stat.st_size, stat.st_mtime_ns)
    known = read_record(folder, name)
    if known is None or (known.path, known.size, known.mtime_ns) != now:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        known = FileRecord(*now, hashes={}, date=today)
    missing = [algorithm for algorithm in algorithms if algorithm not in known.hashes]
    hashes = known.hashes | {algorithm: hash_file(path, algorithm) for algorithm in missing}
    record = replace(known, hashes=hashes, origin=origin or known.origin)
    if record != known:
        try:
            write_json(folder / STATE / f"{name}.json", asdict(record))
        except OSError as error:
            raise FetchError(write_problem(folder / name, error)) from None
    return record


def read_record(folder: Path, name: str) -> FileRecord | None:
    """What is known of file `name` in `folder`, if anything."""
    try:
        return FileRecord(**json.loads((folder / STATE / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # never written, or by another version: computed again


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time write `name`: two data sets of a run may need the same file."""
    import fcntl

    with ExitStack() as stack:
        try:
            (folder / STATE).mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(folder / STATE / f"{name}.lock", "a"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some file systems have no locks
                raise FetchError(write_problem(folder / name, error)) from None
        yield


def say(text: str) -> None:
    """Tell the user, on stderr."""
    print(f"perturbed: {text}", file=sys.stderr)
