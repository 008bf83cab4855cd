"""One member of a zip, tar or gzip archive, taken out without trusting the archive."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, cast

from perturbed.errors import DataError, suggest
from perturbed.files import atomic

MAX_BYTES = 200 * 2**30
"""A member larger than this is refused."""
MAX_RATIO = 200.0
"""A member that unpacks to more than this many times its packed size is refused: real matrices stay below 30."""
FREE_BYTES = 16 * 2**20
"""Below this size the ratio is not looked at; tiny files of zeros are harmless."""
BLOCK = 2**20
BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
)  # fmt: skip
"""What the readers raise for archives that are cut or changed."""


def extract_member(
    archive: str | Path,
    member: str,
    target: str | Path,
    *,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
) -> Path:
    """Write one member of an archive to `target`, whole or not at all.

    Parameters
    ----------
    archive
        A zip, tar (also compressed) or gzip file, told by its content; of a gzip file any `member` is the one it holds.
    member
        Name inside the archive, with `/` between folders.
    target
        Where to write; the archive has no say in it.
    sha256
        Hash the member must have.
    max_bytes, max_ratio
        Limits on the unpacked size and on unpacked / packed size, counted while unpacking.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    DataError
        If the archive is broken, holds no such regular file, breaks a limit, or the hash differs.
    """
    archive = Path(archive)
    target = Path(target)
    digest = hashlib.sha256()
    with atomic(target) as part:
        with open(part, "wb") as out:
            for block in iter_member(archive, member, max_bytes=max_bytes, max_ratio=max_ratio):
                digest.update(block)
                out.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            found = digest.hexdigest()
            raise DataError(f"{archive}: member {member!r} has sha256 {found}, not {sha256}; fetch the archive anew")
    return target


def hash_member(archive: str | Path, member: str) -> str:
    """Hex sha256 of a member's content, without writing it."""
    digest = hashlib.sha256()
    for block in iter_member(archive, member):
        digest.update(block)
    return digest.hexdigest()


def iter_member(
    archive: str | Path, member: str, *, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
) -> Iterator[bytes]:
    """Yield a member's content in blocks; limits and errors as in `extract_member`."""
    archive = Path(archive)
    _check_name(archive, member)
    done = 0
    try:
        with _open_member(archive, member) as (stream, packed):
            limit = min(max_bytes, max(FREE_BYTES, int(max_ratio * packed)))
            while block := stream.read(BLOCK):
                done += len(block)
                if done > limit:
                    raise DataError(
                        f"{archive}: member {member!r} unpacks to more than {limit:,} bytes from {packed:,}; "
                        "this looks like a decompression bomb, get the archive from another source"
                    )
                yield block
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: broken archive ({reason}); delete it and fetch it anew") from None


def _check_name(archive: Path, member: str) -> None:
    """Refuse names that lead out of a folder; they are never needed, and a card that holds one is wrong."""
    path = PurePosixPath(member)
    windows = PureWindowsPath(member)
    if not path.parts or path.is_absolute() or windows.drive or windows.root or "\\" in member or ".." in path.parts:
        raise DataError(f"{archive}: member {member!r} leads out of the archive; give a plain name inside it")


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """The member's stream and its packed size (of the whole archive where the member's own is unknown)."""
    if not archive.is_file():
        raise DataError(f"{archive}: no such archive; fetch it first")
    size = archive.stat().st_size
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed, packed.open(_zip_info(archive, packed, member)) as stream:
            yield stream, packed.getinfo(member).compress_size
    elif _is_tar(archive):
        with tarfile.open(archive) as tar:
            yield _tar_stream(archive, tar, member), size
    elif _is_gzip(archive):
        with gzip.open(archive) as plain:
            yield cast(IO[bytes], plain), size
    else:
        raise DataError(f"{archive}: neither zip, tar nor gzip; the download may be an error page, delete it")


def _is_tar(path: Path) -> bool:
    if not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path) as tar:  # packed zeros, which a gzip file may well begin with, read as an empty tar
        return tar.next() is not None


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


def _zip_info(archive: Path, packed: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    found = [info for info in packed.infolist() if info.filename == member]
    if not found:
        raise DataError(f"{archive}: no member {member!r}; {suggest(member, packed.namelist()[:50])}")
    if len(found) > 1:
        raise DataError(f"{archive}: member {member!r} occurs {len(found)} times; get the archive from another source")
    mode = found[0].external_attr >> 16
    if found[0].is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
        raise DataError(f"{archive}: member {member!r} is no regular file (a folder or link); name a file")
    if found[0].flag_bits & 1:
        raise DataError(f"{archive}: member {member!r} is encrypted; unpack it by hand and use a `path` source")
    return found[0]


def _tar_stream(archive: Path, tar: tarfile.TarFile, member: str) -> IO[bytes]:
    names = []
    for info in tar:  # stops at the member: a large compressed tar need not be read to its end
        names.append(info.name)
        if PurePosixPath(info.name) == PurePosixPath(member):
            stream = tar.extractfile(info) if info.isreg() else None
            if stream is None:
                raise DataError(f"{archive}: member {member!r} is no regular file (a folder or link); name a file")
            return stream
    raise DataError(f"{archive}: no member {member!r}; {suggest(member, names[:50])}")
