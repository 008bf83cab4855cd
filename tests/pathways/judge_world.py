"""Small enrichments to judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.pathways.judge_providers import Reply
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


COMMAND_LINE = "from perturbed.cli import main; main()"
"""`perturbed …` for `python -c`."""
