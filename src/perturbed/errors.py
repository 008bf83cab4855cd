"""Errors a user can mend: one line that names the file or key, what is wrong and what to do."""

from __future__ import annotations

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


def suggest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest valid name, or the list of valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"
