"""What the judge of pathways is asked, of whom and how often. Read by the planner, so free of heavy imports."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from perturbed.config import Section
from perturbed.data.download import Refused, check_address

PROMPT = """\
Subject: {subject}
Pathway: {pathway}

Is this pathway highly relevant to the subject? Answer "yes" only if what is known ties the pathway itself to the \
mechanism, progression or treatment of the subject. Answer "no" if the tie is one that most pathways would have, such \
as being active in the tissue, or if you know of none.

Reply with one JSON object and nothing else:
{"relevant": "yes" or "no", "confidence": a number from 0 to 1, "reason": "one sentence of at most 25 words"}"""
"""Question of the judge; `{pathway}` and `{subject}` are filled in, other braces stand as they are."""


class JudgeSpec(Section):
    """A language model that is asked, blind, whether pathways are relevant to a subject."""

    provider: Literal["none", "openai", "replay"] = "none"
    """Who answers. `none`: nobody, and every table says so. `openai`: a server that speaks the protocol of OpenAI's
    chat completions, a hosted one or one on this machine. `replay`: answers that were kept earlier."""
    subject: str = Field("type 2 diabetes in mouse pancreatic islets", min_length=3)
    """What pathways are judged against."""
    method: Literal["ora", "rank", "gsea"] = "ora"
    """Test of the enrichment whose first pathways are judged."""
    background: Literal["model", "genome"] = "model"
    """Its background."""
    prompt: str = PROMPT
    """The question, with `{pathway}` and `{subject}`."""
    show_genes: bool = False
    """Add the pathway's genes to the question; the paper showed the name alone."""
    base_url: str | None = None
    """Address of the server: https, or http on this machine, such as `http://localhost:8000/v1`; leave out for the
    client library's own."""
    model: str | None = None
    """Model to ask; with `replay`, the one that was asked."""
    key_env: str | None = Field("OPENAI_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]{0,63}$")
    """Name of the environment variable that holds the server's key, in capitals, never the key itself; null for a
    server without keys."""
    replay: str | None = None
    """File of kept answers (the `--cache` of an earlier run) for `replay`."""
    n_votes: int = Field(3, ge=1, le=99)
    """How often each pathway is asked about (the paper's 3)."""
    aggregation: Literal["majority", "unanimous", "any"] = "majority"
    """Votes needed for `yes`: more than half, all, or one. Where invalid votes could change it there is no verdict."""
    n_random: int = Field(100, ge=100)
    """Pathways of each library that are in no list, of like size as those that are: what the lists are compared to."""
    seed: int = 0
    """Of the random pathways, the order of the questions, the bootstrap, and, with `send_seed`, of the answers."""
    send_seed: bool = True
    """Send each request a seed of its own, for servers that can then repeat an answer."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature; null leaves it to the server. At 0 the votes are one answer given several times."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer; null leaves it to the server. What a model thinks before it answers counts."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as `{reasoning_effort: low}`; never a secret, they are written down."""
    timeout: float = Field(120.0, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(6, ge=0)
    """Further tries of a request that failed on the way: timeouts, lost connections, status 408, 409, 429 and 5xx."""
    malformed_retries: int = Field(2, ge=0)
    """Further tries of a question whose answer cannot be read; then the vote is invalid, which is not `no`."""
    concurrency: int = Field(4, ge=1, le=256)
    """Requests in flight."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Most requests a minute; null for no limit."""
    price_per_million_input_tokens: float | None = Field(None, ge=0)
    """Price, in any currency, to work out the cost; null for unknown."""
    price_per_million_output_tokens: float | None = Field(None, ge=0)
    """The same for the answers."""

    @field_validator("base_url")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("give the whole address, such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:  # what stands here is written down
            raise ValueError("give the address without user, password, query or fragment; the key goes into `key_env`")
        try:
            check_address(value, True)
        except Refused as error:  # the key would travel for all to read
            raise ValueError(f"{error}; http is for a server on this machine (localhost), or a tunnel to one") from None
        return value

    @model_validator(mode="after")
    def _check(self) -> JudgeSpec:
        missing = [field for field in ("{pathway}", "{subject}") if field not in self.prompt]
        if missing:
            raise ValueError(f"`prompt` lacks {' and '.join(missing)}")
        if self.provider != "none" and not self.model:
            raise ValueError(f"provider {self.provider} needs `model`")
        if (self.provider == "replay") != (self.replay is not None):
            raise ValueError("`replay`, the file, goes with `provider: replay`")
        taken = sorted({"model", "messages", "temperature", "max_tokens", "seed", "response_format"} & set(self.extra))
        if taken:
            raise ValueError(f"`extra` may not hold {taken[0]!r}; there is a key of its own, or it is the judge's")
        return self
