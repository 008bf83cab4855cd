"""The judge of pathways: a language model asked, blind, which pathways are relevant, and what its answers are worth.

It is shown a pathway's name and the subject, never a list, rank or ratio; pathways of all lists and random ones are
asked about in one shuffled row, each once per vote. Lists are then compared to the random pathways, because a model
that finds everything relevant proves nothing of any list.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.errors import ConfigError, DataError
from perturbed.files import atomic, write_json
from perturbed.pathways.judge_asking import Asker, Vote, make_votes
from perturbed.pathways.judge_cache import AnswerCache, answer_key, final
from perturbed.pathways.judge_providers import OpenAIProvider, Provider
from perturbed.pathways.judge_questions import Panel, read_panel
from perturbed.pathways.judge_spec import JudgeSpec
from perturbed.pathways.judge_statistics import NOT_JUDGED, decide, tabulate_agreement, tabulate_odds

log = logging.getLogger(__name__)


def judge_pathways(
    enrichment: str | Path,
    gene_sets: Mapping[str, Path],
    spec: JudgeSpec,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    provider: Provider | None = None,
) -> None:
    """Judge the first pathways of each list and random ones beside them.

    Parameters
    ----------
    enrichment
        Folder of `perturbed enrich`.
    gene_sets
        GMT files that it read, by library.
    spec
        Section `judge`.
    out
        Folder to write, whole or not at all: `verdicts.csv` (a pathway a row), `answers.csv` (a vote a row), `odds.csv`
        (lists against random pathways), `agreement.csv` (of the votes) and `cost.json`. Equal answers give equal bytes.
    cache
        JSONL in which answers are kept as they come, for `provider: openai`; what is in it is not asked again.
    provider
        Who answers, instead of the one that `spec` names.

    Raises
    ------
    PerturbedError
        If a file is wrong, an answer to replay is missing, or the server does not answer; answers that came are kept.
    """
    panel = read_panel(enrichment, gene_sets, spec)
    votes = make_votes(panel.messages, spec)
    _report_shortage(panel, spec)
    if spec.provider == "openai" and provider is None and cache is None:
        raise ConfigError("judge: provider openai needs --cache, the file in which its answers are kept")
    kept = {"none": None, "openai": cache, "replay": spec.replay}[spec.provider]
    with AnswerCache(kept, writable=spec.provider == "openai") as answers:
        missing = [vote for vote in votes if _final(answers, vote.key, spec) is None]
        if spec.provider == "replay":
            _check_replay(missing, votes, spec)
        elif spec.provider == "openai" and missing:
            Asker(provider or OpenAIProvider(spec), spec, answers).ask_all(votes)
        tables = tabulate(panel, spec, answers)
        cost = count_cost(votes, panel, spec, answers)
    with atomic(out) as part:
        part.mkdir()
        for name, table in tables.items():
            table.to_csv(part / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")
        write_json(part / "cost.json", cost)


def tabulate(panel: Panel, spec: JudgeSpec, answers: AnswerCache) -> dict[str, pd.DataFrame]:
    """The tables `verdicts`, `answers`, `odds` and `agreement` of what was answered."""
    rows: list[dict[Any, Any]] = []
    given: list[dict[Any, Any]] = []
    for row, messages in zip(panel.pathways.to_dict("records"), panel.messages):
        found = [_final(answers, answer_key(spec, messages, vote), spec) for vote in range(spec.n_votes)]
        if spec.provider == "none":
            found = []
        named = {"library": row["library"], "pathway": row["pathway"]}
        rows.append({**row, **_verdict([one for one in found if one], spec)})
        for vote, one in enumerate(found):
            given.append({**named, "vote": vote, **{column: (one or {}).get(column) for column in _ANSWER}})
    verdicts = pd.DataFrame(rows)
    return {
        "verdicts": verdicts,
        "answers": pd.DataFrame(given, columns=["library", "pathway", "vote", *_ANSWER]),
        "odds": tabulate_odds(verdicts, panel.memberships),
        "agreement": tabulate_agreement(verdicts, spec.n_votes, spec.seed),
    }


_ANSWER = ("status", "relevant", "confidence", "model", "format", "reason")


def _verdict(found: list[dict[str, Any]], spec: JudgeSpec) -> dict[str, Any]:
    """Votes of one pathway and what follows from them; `agreement` is the share of answers that the larger side has."""
    status = Counter(one["status"] for one in found)
    said = Counter(one["relevant"] for one in found if one["status"] == "answer")
    yes, no = said["yes"], said["no"]
    sure = [one["confidence"] for one in found if one["status"] == "answer" and one["confidence"] is not None]
    return {
        "votes_yes": yes,
        "votes_no": no,
        "votes_invalid": status["malformed"],
        "votes_refused": status["refusal"],
        "verdict": decide(yes, no, spec.n_votes, spec.aggregation) if found else NOT_JUDGED,
        "agreement": max(yes, no) / (yes + no) if yes + no else np.nan,
        "confidence": float(np.mean(sure)) if sure else np.nan,
    }


def count_cost(votes: list[Vote], panel: Panel, spec: JudgeSpec, answers: AnswerCache) -> dict[str, Any]:
    """What the answers cost, counted from the kept answers themselves: the same after any number of interruptions.

    `requests` counts those that an answer came to, malformed ones too; `seconds` is the sum of their durations.
    """
    kept: list[dict[str, Any]] = []
    finals: list[dict[str, Any]] = []
    for vote in [] if spec.provider == "none" else votes:
        one = _final(answers, vote.key, spec)
        if one is not None:
            attempts = answers.attempts(vote.key)
            kept += attempts[: attempts.index(one) + 1]
            finals.append(one)
    status = Counter(one["status"] for one in finals)
    tokens = {kind: sum(one[f"{kind}_tokens"] or 0 for one in kept) for kind in ("input", "output")}
    unknown = sum(one["input_tokens"] is None or one["output_tokens"] is None for one in kept)
    prices = {"input": spec.price_per_million_input_tokens, "output": spec.price_per_million_output_tokens}
    known = bool(kept) and not unknown and None not in prices.values()
    return {
        "provider": spec.provider, "subject": spec.subject, "model": spec.model,
        "models_that_answered": sorted({one["model"] for one in kept}),
        "servers": sorted({one["server"] for one in kept}), "formats": sorted({one["format"] for one in kept}),
        "temperature": spec.temperature, "seed": spec.seed, "n_votes": spec.n_votes, "aggregation": spec.aggregation,
        "n_pathways": len(panel.pathways), "n_random": int(panel.pathways["is_random"].sum()),
        "n_random_wanted": spec.n_random * panel.pathways["library"].nunique(),
        "n_questions": len(votes), "n_answers": status["answer"], "n_invalid": status["malformed"],
        "n_refused": status["refusal"], "requests": len(kept), "requests_without_usage": unknown,
        "input_tokens": tokens["input"], "output_tokens": tokens["output"],
        "seconds": round(sum(one["seconds"] for one in kept), 3),
        "cost": round(sum(tokens[kind] * (prices[kind] or 0) for kind in tokens) / 1e6, 6) if known else None,
    }  # fmt: skip


def _final(answers: AnswerCache, key: str, spec: JudgeSpec) -> dict[str, Any] | None:
    return final(answers.attempts(key), spec.malformed_retries)


def _check_replay(missing: list[Vote], votes: list[Vote], spec: JudgeSpec) -> None:
    if missing:
        first = " ".join(missing[0].messages[-1]["content"].split())[:80]
        raise DataError(
            f"{spec.replay}: lacks {len(missing)} of {len(votes)} answers of model {spec.model} (the first: vote "
            f"{missing[0].number} on {first!r}); the question, the model and its options must be those of the kept "
            "answers, or ask for the missing ones with `provider: openai` and this file as --cache"
        )


def _report_shortage(panel: Panel, spec: JudgeSpec) -> None:
    random = panel.pathways[panel.pathways["is_random"]]
    for library, part in random.groupby("library"):
        if len(part) < spec.n_random:
            log.warning(
                "perturbed: library %s has %d pathways outside the lists, not %d; all are asked about",
                library, len(part), spec.n_random,
            )  # fmt: skip
