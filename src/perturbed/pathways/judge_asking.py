"""Asking many questions: several at a time, no faster than allowed, again where that may help, and each answer kept.

What has come back is in the cache whatever happens next, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from perturbed.files import sha256_text
from perturbed.pathways.judge_cache import AnswerCache, answer_key, final
from perturbed.pathways.judge_providers import JudgeError, Passing, Provider
from perturbed.pathways.judge_spec import JudgeSpec

FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
"""Seconds of the first back-off, which doubles, and of the longest."""
LONGEST_ASKED = 900.0
"""Seconds that a server may ask us to wait; one that asks for more is left for later."""


@dataclass(frozen=True)
class Vote:
    """One question, asked the `number`-th time."""

    messages: list[dict[str, str]]
    number: int
    key: str


def make_votes(questions: Sequence[list[dict[str, str]]], spec: JudgeSpec) -> list[Vote]:
    """All votes in the order they are asked: shuffled by the seed, whatever order the questions come in.

    Parameters
    ----------
    questions
        Messages of each distinct pathway.
    spec
        Section `judge`.
    """
    votes = {
        (key := answer_key(spec, messages, number)): Vote(messages, number, key)
        for messages in questions
        for number in range(spec.n_votes)
    }
    ordered = [votes[key] for key in sorted(votes)]
    random.Random(spec.seed).shuffle(ordered)
    return ordered


class Stopped(Exception):
    """Another request failed for good; this one is not worth waiting for."""


class TokenBucket:
    """At most `per_minute` requests a minute, in bursts of at most `burst`; and a pause for everybody.

    Parameters
    ----------
    per_minute
        Tokens that flow in; None for no limit.
    burst
        Tokens that the bucket holds; it starts full.
    clock
        Seconds, never falling.
    sleep
        Waits so many seconds, or raises.
    """

    def __init__(
        self, per_minute: float | None, burst: int, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._burst = float(burst)
        self._tokens = self._burst
        self._clock, self._sleep = clock, sleep
        self._filled = clock()
        self._paused_until = -float("inf")
        self._lock = threading.Lock()

    def take(self) -> None:
        """Wait for a token and take it."""
        while True:
            with self._lock:
                now = self._clock()
                missing = self._paused_until - now
                if missing <= 0:
                    missing = self._fill(now)
                    if missing <= 0:
                        return
            self._sleep(missing)

    def _fill(self, now: float) -> float:
        """Take a token; or the seconds until there is one."""
        if self._rate is None:
            return 0.0
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens >= 1 - 1e-9:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate

    def pause(self, seconds: float) -> None:
        """Give nobody a token for so long."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)


class Asker:
    """Asks a provider, with patience.

    Parameters
    ----------
    provider
        Who answers.
    spec
        Section `judge`.
    cache
        Where answers go.
    """

    def __init__(self, provider: Provider, spec: JudgeSpec, cache: AnswerCache) -> None:
        self._provider, self._spec, self._cache = provider, spec, cache
        self._stop = threading.Event()
        burst = max(1, min(spec.concurrency, int((spec.requests_per_minute or 60) / 60)))
        self._bucket = TokenBucket(spec.requests_per_minute, burst, time.monotonic, self._sleep)

    def ask_all(self, votes: Sequence[Vote]) -> None:
        """Ask whatever the cache does not answer.

        Raises
        ------
        JudgeError
            If the server refuses, or does not answer in so many tries; says how much is kept.
        """
        waiting = deque(vote for vote in votes if self._final(vote) is None)
        running: set[Future[None]] = set()
        bar = tqdm(total=len(votes), initial=len(votes) - len(waiting), unit=" answers", disable=None, desc="judge")
        with ThreadPoolExecutor(self._spec.concurrency) as pool, bar:
            try:
                while waiting or running:
                    while waiting and len(running) < self._spec.concurrency:
                        running.add(pool.submit(self._ask, waiting.popleft()))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        bar.update()
            except BaseException as error:
                self._stop.set()
                wait(running)  # what is under way may still answer, and is kept
                if isinstance(error, JudgeError):
                    raise JudgeError(f"{error}; {self._progress(votes)}") from None
                raise

    def _progress(self, votes: Sequence[Vote]) -> str:
        kept = sum(self._final(vote) is not None for vote in votes)
        where = self._cache.path or "memory"
        return f"{kept} of {len(votes)} answers are in {where}, run the same command again to go on"

    def _final(self, vote: Vote) -> dict[str, Any] | None:
        return final(self._cache.attempts(vote.key), self._spec.malformed_retries)

    def _ask(self, vote: Vote) -> None:
        try:
            while self._final(vote) is None:
                self._ask_once(vote, len(self._cache.attempts(vote.key)))
        except Stopped:
            pass

    def _ask_once(self, vote: Vote, attempt: int) -> None:
        patience = random.Random(f"{vote.key} {attempt}")
        seed = int(sha256_text(f"{self._spec.seed} {vote.key} {attempt}")[:7], 16) if self._spec.send_seed else None
        for trial in range(self._spec.retries + 1):
            self._bucket.take()
            if self._stop.is_set():
                raise Stopped
            try:
                reply = self._provider.ask(vote.messages, seed)
            except Passing as error:
                self._wait(error, trial, patience)
                continue
            about = {"key": vote.key, "vote": vote.number, "attempt": attempt, "messages": vote.messages}
            asked = {"model_asked": self._spec.model, "temperature": self._spec.temperature, "seed": seed}
            self._cache.add({**about, **asked, "server": self._provider.server, **reply.record()})
            return

    def _wait(self, error: Passing, trial: int, patience: random.Random) -> None:
        where = f"{self._spec.model} at {self._provider.server}"
        if trial == self._spec.retries:
            raise JudgeError(f"judge: {where} did not answer in {trial + 1} tries (the last: {error})")
        if error.wait:
            if error.wait > LONGEST_ASKED:
                raise JudgeError(f"judge: {where} asks to come back in {error.wait:.0f} s ({error})")
            self._bucket.pause(error.wait)  # who is told to wait is told for all
            return
        self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**trial) * (0.5 + patience.random() / 2))

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped
