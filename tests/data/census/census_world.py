"""A small store and cards for the tests of the Census arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perturbed.config import parse
from perturbed.data.census.simulate import Islets, simulate_islets
from perturbed.data.census.spec import CensusCard, IsletParams, ModelCard
from perturbed.data.census.store import write_store

VERSION = "2023-12-15"
PARAMS = IsletParams(n_cells=240, n_genes=300, n_donors=2, n_up=12, n_down=12, n_decoys=150, depth=700.0)
BETA = {"column": "cell_type", "values": "type B pancreatic cell"}


def small_islets(seed: int = 3) -> Islets:
    return simulate_islets(PARAMS, seed)


def write(islets: Islets, path: Path) -> Path:
    write_store(path, "mus_musculus", islets.obs, islets.var, islets.counts, census_version=VERSION)
    return path


def query_card(**keys: Any) -> CensusCard:
    expect = keys.pop("expect", {})
    cells = {"kind": "query", "organism": "mus_musculus", "census_version": VERSION, **keys}
    return parse(CensusCard, {"cells": cells, "expect": expect}, "card")


def file_card(kind: str, path: Path | str, **keys: Any) -> CensusCard:
    return parse(CensusCard, {"cells": {"kind": kind, "local": str(path), **keys}}, "card")


def model_card(**keys: Any) -> ModelCard:
    expect = keys.pop("expect", {})
    return parse(ModelCard, {"model": keys, "expect": expect}, "card")


QUICK_FIT = {
    "kind": "fit", "n_hidden": 16, "n_latent": 4, "epochs": 2, "lr": 0.01, "batch_size": 64, "kl_warmup": 1,
    "min_genes": 20, "n_top_genes": None,
}  # fmt: skip
