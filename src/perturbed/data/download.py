"""One address into one `.part` file: status, size, resume and patience, but no opinion on the content's hash."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import unquote, urljoin, urlsplit

from perturbed.errors import FetchError

if TYPE_CHECKING:
    from requests import Response
    from tqdm import tqdm

CHUNK = 2**20
TIMEOUT = (20.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
RETRIES = 3
"""Attempts without progress, per address."""
PAUSE = 1.0
"""Seconds before the second attempt; doubled each time."""
REDIRECTS = 10
BUSY = (429, 500, 502, 503, 504)
LOCAL = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """An address did not give the file; the text says why, and the next address is tried."""


class _Busy(Exception):
    """Worth another attempt at the same address."""


def download(
    url: str, part: Path, *, size: int | None = None, allow_insecure: bool = False, progress: bool = True
) -> None:
    """Complete `part` from `url`, going on where it ends.

    A dropped connection is taken up again by an HTTP range request as long as bytes keep coming. A server that ignores
    the range starts the file anew. What was received stays in `part` when this fails or is interrupted.

    Parameters
    ----------
    url
        An https address; http and file addresses of this machine with `allow_insecure`.
    part
        File to write, or to go on with.
    size
        Bytes of the whole file, where known; anything else is refused.
    allow_insecure
        Accept `http://localhost` and `file://`.
    progress
        Draw a progress bar on stderr.

    Raises
    ------
    Refused
        If this address does not give the file.
    FetchError
        If the file cannot be written, which no other address would mend.
    """
    import requests
    import urllib3

    check_address(url, allow_insecure)
    transient = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError, _Busy)
    longest, failures = _size(part), 0
    while True:
        try:
            if urlsplit(url).scheme == "file":
                _copy(url, part)
            else:
                _transfer(url, part, size, allow_insecure, progress)
            return
        except transient as error:
            failures = 0 if _size(part) > longest else failures + 1
            longest = max(longest, _size(part))
            if failures >= RETRIES:
                raise Refused(_reason(error)) from None
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))
        except requests.RequestException as error:
            raise Refused(_reason(error)) from None


def check_address(url: str, allow_insecure: bool) -> None:
    """Refuse what could be read or changed on its way: only https, or this machine where that is allowed."""
    address = urlsplit(url)
    local = address.scheme == "file" or (address.scheme == "http" and address.hostname in LOCAL)
    if address.scheme == "https" or (local and allow_insecure):
        return
    raise Refused(f"only https addresses are accepted, not {address.scheme or 'no scheme'}://{address.netloc}")


def _transfer(url: str, part: Path, size: int | None, allow_insecure: bool, progress: bool) -> None:
    start = _size(part)
    if size is not None and start == size:
        return
    if size is not None and start > size:
        part.unlink()
        start = 0
    with _request(url, start, allow_insecure) as response:
        start = _check_response(response, part, start, size)
        length = response.headers.get("Content-Length", "")
        total = size or (start + int(length) if length.isdigit() else None)
        with _open_part(part, "ab" if start else "wb") as handle, _bar(part, start, total, progress) as bar:
            # The bytes as they are on the wire: a `.gz` that a server labels as compressed must stay compressed.
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                _append(handle, chunk, part)
                bar.update(len(chunk))
                if size is not None and handle.tell() > size:
                    raise Refused(f"more than the expected {size:,} bytes")
    if _size(part) == 0:
        raise Refused("empty body")
    if size is not None and _size(part) < size:
        raise Refused(f"body ended after {_size(part):,} of {size:,} bytes")


@contextmanager
def _request(url: str, start: int, allow_insecure: bool) -> Iterator[Response]:
    """The response at the end of all redirects, each of them checked as the first address is."""
    import requests

    headers = {"User-Agent": f"perturbed/{_version()} (+requests)", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    for _ in range(REDIRECTS):
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False)
        if not response.is_redirect:
            with response:
                yield response
            return
        response.close()
        url = urljoin(url, response.headers["Location"])
        check_address(url, allow_insecure)
    raise Refused(f"more than {REDIRECTS} redirects")


def _check_response(response: Response, part: Path, start: int, size: int | None) -> int:
    """The offset at which the body belongs, 0 where the server sends the whole file.

    Only 200, and 206 where a range was asked for, are a file: portals answer 202 with an empty body when they want a
    browser to solve a riddle, and command-line clients then report success.
    """
    status, length = response.status_code, response.headers.get("Content-Length", "")
    if status in BUSY:
        raise _Busy(f"HTTP {status}")
    if status == 416 and start:
        part.unlink()
        raise _Busy("HTTP 416, the partial file does not fit")
    if status not in (200, 206) or (status == 206 and not start):
        raise Refused(f"HTTP {status}" + (" with an empty body (a bot challenge)" if status == 202 else ""))
    if status == 200:
        start = 0
    else:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != start:
            part.unlink()
            raise _Busy("HTTP 206 with another range than asked for")
    if length == "0":
        raise Refused("empty body")
    if size is not None and length.isdigit() and start + int(length) != size:
        raise Refused(f"{start + int(length):,} bytes, expected {size:,}")
    return start


def _copy(url: str, part: Path) -> None:
    source = Path(unquote(urlsplit(url).path))
    if not source.is_file():
        raise Refused("no such file")
    with open(source, "rb") as content, _open_part(part, "wb") as handle:
        while block := content.read(CHUNK):
            _append(handle, block, part)
    if _size(part) == 0:
        raise Refused("empty file")


def _open_part(part: Path, mode: Literal["ab", "wb"]) -> FileIO:
    """Unbuffered, so that a full disk shows in the write that hits it and not once more on closing."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        return open(part, mode, buffering=0)
    except OSError as error:
        raise FetchError(write_problem(part.with_suffix(""), error)) from None


def _append(handle: FileIO, chunk: bytes, part: Path) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[handle.write(rest) :]
    except OSError as error:
        part.unlink(missing_ok=True)  # half a file would keep the disk full
        raise FetchError(write_problem(part.with_suffix(""), error)) from None


def write_problem(path: str | Path, error: OSError) -> str:
    """One line for a file that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "errno = 28" in str(error)  # h5py hides errno in its text
    if full:
        return f"{path}: no space left on the disk; free some, or choose another folder (`data` in the config)"
    return f"{path}: cannot be written ({error.strerror or ' '.join(str(error).split())}); check the folder"


def _bar(part: Path, start: int, total: int | None, progress: bool) -> tqdm[NoReturn]:
    from tqdm import tqdm

    # In a log file each refresh is a line of its own, so there it comes rarely.
    every = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, mininterval=every, disable=not progress
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.Timeout):
        return "timed out"
    inner = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return " ".join(str(inner).split())[:160] or type(error).__name__


def _version() -> str:
    try:
        return version("perturbed")
    except PackageNotFoundError:
        return "0"
