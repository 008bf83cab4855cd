"""Small enrichments to judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from judge_server import asked_about, verdict

from perturbed.files import sha256_text
from perturbed.pathways.judge_providers import Reply, read_completion
from perturbed.pathways.judge_spec import JudgeSpec

LISTS = ("gradient_unperturbed", "gradient_perturbed", "median_decoded")


def write_world(
    folder: Path, n_pathways: int = 140, n_top: int = 10, seed: int = 0, libraries: Sequence[str] = ("wiki",)
) -> tuple[Path, dict[str, Path]]:
    """A folder of `perturbed enrich` and its GMT files; the first two lists share pathways."""
    rng = np.random.default_rng(seed)
    enrichment, top, paths = [], [], {}
    for library in libraries:
        names = [f"{library} pathway {i:03d}" for i in range(n_pathways)]
        sizes = np.round(np.exp(rng.normal(3.2, 0.8, n_pathways))).astype(int).clip(5, 400)
        order = rng.permutation(n_pathways)
        starts = {name: 0 if place == 0 else 5 + (place - 1) * n_top for place, name in enumerate(LISTS)}
        for name in LISTS:
            for method, background in (("ora", "model"), ("ora", "genome"), ("rank", "model")):
                key = {"library": library, "list": name, "group": "all", "method": method, "background": background}
                scale = 2 if background == "genome" else 1
                enrichment += [
                    {**key, "pathway": names[i], "set_size": sizes[i] * scale, "overlap": 3, "ratio": 1.5, "p": 0.01}
                    for i in range(n_pathways)
                ]
                shift = {"ora": 0, "rank": 3}[method]
                picked = order[starts[name] + shift : starts[name] + shift + n_top]
                top += [{"place": place + 1, **key, "pathway": names[i]} for place, i in enumerate(picked)]
        paths[library] = folder / f"{library}.gmt"
        lines = ["\t".join([names[i], "", *(f"G{k}" for k in range(sizes[i]))]) for i in range(n_pathways)]
        folder.mkdir(parents=True, exist_ok=True)
        paths[library].write_text("\n".join(lines) + "\n")
    out = folder / "enrichment"
    out.mkdir()
    pd.DataFrame(enrichment).to_csv(out / "enrichment.csv", index=False)
    pd.DataFrame(top).to_csv(out / "top.csv", index=False)
    return out, paths


def make_spec(**changes: Any) -> JudgeSpec:
    """A section `judge` that asks a server without a key."""
    return JudgeSpec(**{"provider": "openai", "model": "tiny", "key_env": None, "n_votes": 1, **changes})


class Oracle:
    """A provider in this process: `answer(text, vote)` says yes or no."""

    server = "in process"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def ask(self, messages: list[dict[str, str]], seed: int | None) -> Reply:
        text = messages[-1]["content"]
        self.asked.append(text)
        return Reply("answer", self.answer(text, self.asked.count(text) - 1), 0.5, "so", "oracle", 10, 5, 0.1)


class Client:
    """A provider in this process whose answers are read as those of a server are: `script` as of `JudgeServer`."""

    server = "in process"

    def __init__(self, script: Any) -> None:
        self.script = script

    def ask(self, messages: list[dict[str, str]], seed: int | None) -> Reply:
        what = self.script({"messages": messages, "seed": seed}, 0)
        choice = SimpleNamespace(message=SimpleNamespace(content=what["content"], refusal=None), finish_reason="stop")
        usage = SimpleNamespace(prompt_tokens=100, completion_tokens=20)
        return read_completion(SimpleNamespace(choices=[choice], model="client", usage=usage), 0.0, "text")


# --- worlds whose pathways' names say which are relevant ----------------------------------------------------------

SHARE = 0.4
"""Share of relevant names where nothing is planted; and of `yes` where a judge does not read names."""
PLACED = {
    "gradient_unperturbed": (0, 12),
    "gradient_perturbed": (8, 20),
    "median_decoded": (20, 32),
    "random": (28, 40),
}
"""Lists by their places in a row of pathways: two neighbours share four."""


def write_named_world(
    folder: Path, preference: float, seed: int, n_pathways: int = 200
) -> tuple[Path, dict[str, Path]]:
    """A folder of `perturbed enrich` with its GMT file, each seed another one.

    Pathways are named as insulin's or as another's. `preference` multiplies the odds that a pathway of the gradients'
    lists is insulin's; nothing but the name tells.
    """
    rng = np.random.default_rng([11, seed])
    odds = np.full(n_pathways, SHARE / (1 - SHARE))
    odds[: PLACED["gradient_perturbed"][1]] *= preference
    relevant = rng.random(n_pathways) < odds / (1 + odds)
    number = rng.permutation(n_pathways)
    names = [f"{'Insulin' if yes else 'Other'} pathway {i:03d}" for yes, i in zip(relevant, number)]
    sizes = np.round(np.exp(rng.normal(3.2, 0.8, n_pathways))).astype(int).clip(5, 400)
    out, gmt = folder / "enrichment", folder / "wiki.gmt"
    out.mkdir(parents=True)
    gmt.write_text("".join(f"{name}\t\tG0\n" for name in names))
    pd.DataFrame({"library": "wiki", "pathway": names, "set_size": sizes}).to_csv(out / "enrichment.csv", index=False)
    top = [
        {"library": "wiki", "list": name, "group": "all", "pathway": pathway}
        for name, (first, last) in PLACED.items()
        for pathway in names[first:last]
    ]
    pd.DataFrame(top).to_csv(out / "top.csv", index=False)
    return out, {"wiki": gmt}


def read_names(pathway: str) -> bool:
    """A judge that finds relevant what is named so."""
    return pathway.startswith("Insulin")


def toss_coins(seed: int) -> Any:
    """A judge that knows nothing: a coin of its own for every name, whatever the name says."""
    return lambda pathway: _uniform(f"{seed} {pathway}") < SHARE


def answer_noisily(find_relevant: Any, noise: float = 0.03) -> Any:
    """A script that says what `find_relevant` says of the pathway, but for a share of votes, by the seed sent."""

    def script(request: dict[str, Any], before: int) -> dict[str, Any]:
        pathway = asked_about(request)
        wrong = _uniform(f"{request['seed']} {pathway}") < noise
        return verdict("yes" if find_relevant(pathway) != wrong else "no")

    return script


def _uniform(text: str) -> float:
    return int(sha256_text(text)[:12], 16) / 16**12


COMMAND_LINE = "from perturbed.cli import main; main()"
"""`perturbed …` for `python -c`."""
