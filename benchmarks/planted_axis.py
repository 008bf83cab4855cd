"""How well each list finds planted genes, over effects and seeds of the simulated islets: recovery, not speed.

    python benchmarks/planted_axis.py --out planted_axis.csv

One draw says little, and the shipped simulation's difficulty was chosen after a look at one. Every row here is a store,
a model and a scored case of its own, by the cards of the demo (or of `--size islets_simulated`) with other effects and
seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
LISTS = ["gradient_unperturbed", "gradient_perturbed", "median_decoded", "pseudobulk", "axis_correlation", "random"]
CASE = {
    "unperturbed": {"column": "disease", "values": ["normal"]},
    "perturbed": {"column": "disease", "values": ["type 2 diabetes mellitus"]},
    "judged": ["type B pancreatic cell"],
    "n_cells": 400,
    "top": 70,
}


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "perturbed.cli", *map(str, words)], check=True, stderr=subprocess.DEVNULL)


def score(size: str, effect: float, seed: int, folder: Path) -> pd.DataFrame:
    """One world: simulate, query, fit, score."""
    card = yaml.safe_load((ROOT / f"config/census/{size}.yaml").read_text())
    card["cells"]["seed"] = seed
    card["cells"].setdefault("params", {})["effect"] = effect
    model = yaml.safe_load((ROOT / f"config/models/{size}.yaml").read_text())
    model["model"]["seed"] = seed
    texts = {"card": card, "model": model, "case": {**CASE, "seed": seed}}
    for name, content in texts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    at = {name: folder / name for name in ("store", "truth.csv", "sets.gmt", "cells.h5ad", "model", "tables")}
    named = ("--name", "islets", "--card", folder / "card.yaml", "--store", at["store"])
    run("census", "simulate", *named, "--truth", at["truth.csv"], "--gene-sets", at["sets.gmt"])
    run("census", "query", *named, "--out", at["cells.h5ad"])
    given = ("--name", "islets", "--card", folder / "model.yaml", "--cells", at["cells.h5ad"])
    run("census", "model", *given, "--out", at["model"])
    files = ("--cells", at["cells.h5ad"], "--model", at["model"], "--truth", at["truth.csv"])
    run("score-genes", *files, "--spec", folder / "case.yaml", "--out", at["tables"])
    table = pd.read_csv(at["tables"] / "planted.csv")
    return table[table["list"].isin(LISTS) & (table["measure"] == "auprc")].assign(effect=effect, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="islets_simulated_demo", help="cards of cells and model")
    parser.add_argument("--effects", type=float, nargs="+", default=[0.05, 0.2, 0.4, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("planted_axis.csv"))
    options = parser.parse_args()
    tables = []
    for effect in options.effects:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                tables.append(score(options.size, effect, seed, Path(folder)))
            print(f"effect {effect}, seed {seed} done", file=sys.stderr, flush=True)
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(options.out, index=False, float_format="%.6g", lineterminator="\n")
    for how in ("mean", "min", "max"):
        over_seeds = table.pivot_table(index=["group", "effect"], columns="list", values="value", aggfunc=how)
        print(f"{how} over seeds\n{over_seeds[LISTS].round(2).to_string()}")


if __name__ == "__main__":
    main()
