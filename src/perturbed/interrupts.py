"""Being asked to stop: Ctrl-C, a cancelled job, a preemption, a time limit that draws near.

A scheduler asks with a signal and kills some seconds later. Every verb answers by cleaning up and ending with
128 + the signal's number; training first brings its step to an end and writes a checkpoint, to be resumed from.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What counts as being asked: Ctrl-C; the end of a job, by Slurm and most others; the usual warning before it."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop; like Ctrl-C, it passes through `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """Exit code, as shells count it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def heed_signals() -> None:
    """Make every signal of `SIGNALS` raise `Stopped` in the main thread; for programs, not for a library's users."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        if _is_repeated(other):
            signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def _is_repeated(number: int) -> bool:
    """Whether a second signal of this kind means no more than the first: Slurm asks twice at a time limit."""
    return number != signal.SIGINT


@contextmanager
def postponed(wanted: bool = True) -> Iterator[Callable[[], int | None]]:
    """Only note a signal while the body runs; yield what asks which one came (None: none yet).

    A second Ctrl-C is not postponed, so that nobody has to wait; repeated requests of a scheduler are ignored. Outside
    the main thread, which alone receives signals, and where it is not wanted, nothing changes.

    Raises
    ------
    Stopped
        At the end of the body, where a signal came and the body did not act on it; at once on a second Ctrl-C.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and not _is_repeated(number):
            raise Stopped(number)
        noted.append(number)

    here = wanted and threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in SIGNALS} if here else {}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            over = bool(noted) and handler is _stop and _is_repeated(number)
            signal.signal(number, signal.SIG_IGN if over else signal.SIG_DFL if handler is None else handler)
    if noted:
        raise Stopped(noted[0])
