"""Who answers the judge: a server that speaks OpenAI's chat completions, and what is made of its answers."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from perturbed.data.download import Refused, check_address
from perturbed.errors import PerturbedError
from perturbed.pathways.judge_spec import JudgeSpec

ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "relevant": {"type": "string", "enum": ["yes", "no"]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "reason": {"type": "string", "maxLength": 400},
    },
    "required": ["relevant", "confidence", "reason"],
    "additionalProperties": False,
}
FORMATS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    (
        "json_schema",
        {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": ANSWER_SCHEMA}},
    ),
    ("json_object with schema", {"type": "json_object", "schema": ANSWER_SCHEMA}),
    ("json_object", {"type": "json_object"}),
    ("text", None),
)
"""How an answer's form is asked for, the strictest first; a server that refuses one is asked with the next."""
RETRIED = (408, 409, 425, 429)
LONGEST_REASON = 500
SHORTEST_KEY = 8
_REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|sorry|i can(not|['’]t)|i am (unable|not able)|i['’]m (unable|not able))\b", re.I
)
_THOUGHT = re.compile(r"<think>.*?</think>", re.S)


class JudgeError(PerturbedError):
    """The judge could not be asked."""


class Passing(Exception):
    """A request failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What came back for one request."""

    status: str
    """`answer`, `refusal` or `malformed`."""
    relevant: str | None = None
    """`yes` or `no`, of an answer."""
    confidence: float | None = None
    """From 0 to 1, where it was given."""
    reason: str = ""
    """Of an answer; else the beginning of the text."""
    model: str = ""
    """The model that the server says it was."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 0.0
    """From request to answer."""
    format: str = "text"
    """How its form was asked for."""

    def record(self) -> dict[str, Any]:
        """As kept in the cache."""
        return asdict(self)


class Provider(Protocol):
    """Whoever answers."""

    server: str

    def ask(self, messages: list[dict[str, str]], seed: int | None) -> Reply:
        """Ask once.

        Raises
        ------
        Passing
            If asking again may help.
        JudgeError
            If it will not.
        """
        ...


class OpenAIProvider:
    """A server that speaks OpenAI's chat completions, through the client library `openai`.

    Parameters
    ----------
    spec
        Section `judge`.

    Raises
    ------
    JudgeError
        If the environment variable of the key is not set, or the key stands on the command line, where the record
        beside the output would keep it.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        key = read_key(spec.key_env)
        from openai import OpenAI

        for name in ("httpx", "httpx2"):  # a line for each request, unless somebody asked for it
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.WARNING)
        self._spec = spec
        self._hide = hider(key)
        try:
            self._client = OpenAI(
                api_key=key or "none", base_url=spec.base_url, timeout=spec.timeout, max_retries=0
            )  # tries are counted and waits kept by the judge itself
        except Exception as error:
            raise JudgeError(f"judge: the client cannot be made ({self._hide(str(error))})") from None
        address = str(self._client.base_url)  # may come from the client's own environment variable
        parts = urlsplit(address)
        try:
            check_address(address, True)
        except Refused as error:
            raise JudgeError(f"judge: {self._hide(str(error))}; correct `base_url`, or OPENAI_BASE_URL") from None
        port = f":{parts.port}" if parts.port else ""
        self.server = f"{parts.scheme}://{parts.hostname}{port}{parts.path}".rstrip("/")
        self._lock = threading.Lock()
        self._form = 0
        self._limit = "max_tokens"

    def ask(self, messages: list[dict[str, str]], seed: int | None) -> Reply:
        """Ask once; see `Provider`."""
        import openai

        while True:
            form, limit = self._form, self._limit
            started = time.monotonic()
            try:
                completion = self._client.chat.completions.create(**self._request(messages, seed, form, limit))
            except openai.APIStatusError as error:
                if not self._adapt(error, form, limit):
                    raise self._translate(error) from None
                continue
            except openai.APITimeoutError:
                raise Passing(f"no answer within {self._spec.timeout:g} s") from None
            except (openai.OpenAIError, ValueError) as error:  # a lost connection, a body that is no JSON
                raise Passing(self._hide(" ".join(str(error).split())[:200])) from None
            seconds = round(time.monotonic() - started, 3)
            return read_completion(completion, seconds, FORMATS[form][0], self._hide)

    def _request(self, messages: list[dict[str, str]], seed: int | None, form: int, limit: str) -> dict[str, Any]:
        spec = self._spec
        optional = {"temperature": spec.temperature, "seed": seed, limit: spec.max_tokens}
        request: dict[str, Any] = {"model": spec.model, "messages": messages}
        request |= {name: value for name, value in optional.items() if value is not None}
        response_format = FORMATS[form][1]
        if response_format is not None:
            request["response_format"] = response_format
        return request | ({"extra_body": spec.extra} if spec.extra else {})

    def _adapt(self, error: Any, form: int, limit: str) -> bool:
        """Ask in another way where the server refuses how it was asked; True where that is worth a try."""
        text = str(error).lower()
        if error.status_code not in (400, 422) and not (error.status_code == 500 and "response_format" in text):
            return False  # llama-cpp-python's server answers 500 where it does not know a form
        with self._lock:  # another thread may have met the same refusal
            if self._limit != limit or self._form != form:
                return True
            if limit == "max_tokens" and "max_completion_tokens" in text:
                self._limit = "max_completion_tokens"
                return True
            if form + 1 < len(FORMATS) and any(word in text for word in ("response_format", "json_schema", "schema")):
                self._form = form + 1
                return True
        return False

    def _translate(self, error: Any) -> Exception:
        said = self._hide(" ".join(str(error).split())[:200])
        if error.status_code in RETRIED or error.status_code >= 500:
            if getattr(error, "code", None) == "insufficient_quota":
                return JudgeError(f"judge: {self.server}: the account has no quota left ({said})")
            return Passing(said, retry_after(error.response.headers.get("retry-after")))
        mend = {
            401: f"check the key in the environment variable {self._spec.key_env}",
            403: f"check what the key in {self._spec.key_env} may do",
            404: "check `base_url` and `model`",
        }.get(error.status_code, "correct the section, for example `temperature: null` or `send_seed: false`")
        return JudgeError(f"judge: {self.server} refused model {self._spec.model}: {said}; {mend}")


def read_key(variable: str | None) -> str | None:
    """The key from the environment, None where the server needs none.

    Raises
    ------
    JudgeError
        If the variable is not set, or what it holds is no key or stands on the command line.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeError(
            f"judge: the environment variable {variable} is not set; put the server's key there, "
            "or say `key_env: null` for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"judge: what the environment variable {variable} holds is no key: not plain ASCII")
    if len(key) < SHORTEST_KEY:  # could not be kept out of logs without harming other words
        raise JudgeError(
            f"judge: what the environment variable {variable} holds is no key: shorter than {SHORTEST_KEY} characters; "
            "for a server without keys say `key_env: null`"
        )
    if any(key in argument for argument in sys.argv):
        raise JudgeError(f"judge: the key of {variable} stands on the command line, which is recorded; take it out")
    return key


def hider(key: str | None) -> Callable[[str], str]:
    """A function that takes the key out of a text, whoever put it there."""
    return (lambda text: text.replace(key, "***")) if key else (lambda text: text)


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header: a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# --- reading answers --------------------------------------------------------------------------------------------------


def read_completion(completion: Any, seconds: float, form: str, hide: Callable[[str], str] = str) -> Reply:
    """Make a reply of a chat completion as the client library returns it.

    Raises
    ------
    Passing
        If it is no chat completion at all, such as the page of a proxy.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list):
        raise Passing("what came back is no chat completion")
    usage = getattr(completion, "usage", None)
    about: dict[str, Any] = {
        "model": hide(str(getattr(completion, "model", None) or "")),
        "input_tokens": getattr(usage, "prompt_tokens", None),
        "output_tokens": getattr(usage, "completion_tokens", None),
        "seconds": seconds,
        "format": form,
    }
    message = getattr(choices[0], "message", None) if choices else None
    text, refusal = (getattr(message, name, None) for name in ("content", "refusal"))
    if refusal or getattr(choices[0] if choices else None, "finish_reason", None) == "content_filter":
        return Reply("refusal", reason=_shorten(hide(str(refusal or text or "filtered"))), **about)
    text = hide(text) if isinstance(text, str) else ""
    try:
        relevant, confidence, reason = read_answer(text)
    except ValueError as error:
        status = "refusal" if _REFUSAL.match(text) else "malformed"
        return Reply(status, reason=_shorten(text) or str(error), **about)
    return Reply("answer", relevant, confidence, _shorten(reason), **about)


def read_answer(text: str) -> tuple[str, float | None, str]:
    """Relevance (`yes` or `no`), confidence and reason of an answer: JSON, alone or somewhere in the text.

    Raises
    ------
    ValueError
        If there is no such object, or there are several that contradict each other.
    """
    text = _THOUGHT.sub("", text)
    found = [item for item in _objects(text) if _yes_or_no(item.get("relevant"))]
    verdicts = {_yes_or_no(item["relevant"]) for item in found}
    if len(verdicts) != 1:
        raise ValueError("no verdict in the answer" if not verdicts else "the answer contradicts itself")
    first = found[0]
    confidence = first.get("confidence")
    if not isinstance(confidence, int | float) or isinstance(confidence, bool) or not 0 <= confidence <= 1:
        confidence = None
    return str(verdicts.pop()), None if confidence is None else float(confidence), str(first.get("reason") or "")


def _objects(text: str) -> list[dict[str, Any]]:
    decoder, found, at = json.JSONDecoder(), [], text.find("{")
    while at != -1:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found.append(value)
        at = text.find("{", end)
    return [value for value in found if isinstance(value, dict)]


def _yes_or_no(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    word = value.strip().strip(".!").lower() if isinstance(value, str) else ""
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(word)


def _shorten(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]
