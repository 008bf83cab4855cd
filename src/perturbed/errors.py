"""Errors a user can mend: one line that names the file or key, what is wrong and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches


class PerturbedError(Exception):
    """Base of every error that the command line shows as one line, without a traceback."""


class ConfigError(PerturbedError):
    """A configuration, card or method file is wrong."""


class DataError(PerturbedError):
    """A data file is missing, broken or breaks its contract."""


class FetchError(PerturbedError):
    """A file could not be had from any of its sources."""


class LeakageError(PerturbedError):
    """Something of the test cells reached training."""


class MethodError(PerturbedError):
    """A method cannot run on these data or with these parameters."""


class UnseenPerturbationError(MethodError):
    """A method cannot predict a perturbation because it never saw one of its genes."""


_NO_SPACE = "nothing half-written is left; free some space and run the same command again"
_NO_ACCESS = "make it accessible, or give another path"
_MENDS = {
    errno.ENOENT: "make it with the stage before, or correct the path",
    errno.EISDIR: "it must be a file, correct the path",
    errno.ENOTDIR: "a part of this path is a file, correct it",
    errno.EEXIST: "delete it, or give another path",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: _NO_ACCESS,
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
}


def find_errno(error: BaseException) -> int | None:
    """The system's number of an error; HDF5 raises other classes too, and names it among its own words."""
    number = getattr(error, "errno", None)
    if number is None:
        number = next((code for code in _MENDS if os.strerror(code) in str(error)), None)
    return number


def spell_os_error(error: BaseException) -> str:
    """What the system refused, with the file and, for the common reasons, the mend."""
    number = find_errno(error)
    said = " ".join(str(error).split())[:200] if number is None else os.strerror(number)
    named = getattr(error, "filename", None)
    if named is None:
        found = re.search(r"filename = '([^']+)'", str(error))
        named = found[1] if found else None
    mend = f"; {_MENDS[number]}" if number in _MENDS else ""
    return f"{named}: {said}{mend}" if named else f"{said}{mend}"


def suggest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest valid name, or the list of valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"
