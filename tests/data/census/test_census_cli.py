"""The verbs of `perturbed census`, end to end on a small simulation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import anndata
import pytest
import yaml
from census_world import PARAMS, QUICK_FIT
from typer.testing import CliRunner

from perturbed.cli_census import census_app
from perturbed.decoders.scvi import load_scvi
from perturbed.errors import ConfigError

CARD = {"cells": {"kind": "simulation", "params": PARAMS.model_dump(), "seed": 3}}
RUNNER = CliRunner()


def run(*words: object) -> None:
    result = RUNNER.invoke(census_app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception


def simulate(folder: Path, card: dict = CARD) -> None:
    files = {"--store": "store", "--truth": "truth.csv", "--gene-sets": "sets.gmt"}
    paths = [word for option, file in files.items() for word in (option, folder / file)]
    run("simulate", "--name", "tiny", "--card", json.dumps(card), *paths)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    simulate(folder)
    return folder


def test_simulate_writes_store_truth_and_gene_sets(simulated, tmp_path):
    with open(simulated / "truth.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 300 and {row["direction"] for row in rows} == {"up", "down", "none"}
    assert list(rows[0]) == [
        "gene_id", "symbol", "effect", "log_difference_beta", "log_difference_alpha", "direction", "set"
    ]  # fmt: skip
    kinds = [line.split("\t")[1] for line in (simulated / "sets.gmt").read_text().splitlines()]
    assert kinds.count("decoy") == 150 and "planted" in kinds
    simulate(tmp_path)
    for name in ("truth.csv", "sets.gmt"):
        assert (tmp_path / name).read_bytes() == (simulated / name).read_bytes()


def test_query_and_model(simulated, tmp_path):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(CARD))
    cells = tmp_path / "cells.h5ad"
    run("query", "--name", "tiny", "--card", tmp_path / "card.yaml", "--store", simulated / "store", "--out", cells)
    assert anndata.read_h5ad(cells).shape == (226, 300)
    assert json.loads((tmp_path / "cells.h5ad.provenance.json").read_text())["verb"] == "census query"
    card = json.dumps({"model": QUICK_FIT})
    run("model", "--name", "m", "--card", card, "--cells", cells, "--out", tmp_path / "model")
    assert len(load_scvi(tmp_path / "model").genes) == 300


def test_verbs_refuse_cards_of_another_kind(simulated, tmp_path):
    query = {"cells": {"kind": "query", "organism": "mus_musculus", "census_version": "2023-12-15"}}
    with pytest.raises(ConfigError, match="kind of tiny is 'query', not simulation"):
        simulate(tmp_path, query)
    with pytest.raises(ConfigError, match="simulated cells lie in a store; make it with `perturbed census simulate`"):
        run("query", "--name", "x", "--card", json.dumps(CARD), "--out", tmp_path / "c.h5ad")
    with pytest.raises(ConfigError, match=r"model.kind of m is 'fit', so cells.h5ad is needed"):
        run("model", "--name", "m", "--card", json.dumps({"model": QUICK_FIT}), "--out", tmp_path / "model")
    local = {"cells": {"kind": "h5ad", "local": "x.h5ad"}}
    with pytest.raises(ConfigError, match=r"--store: cells.kind of x is 'h5ad', which is read from a file"):
        run("query", "--name", "x", "--card", json.dumps(local), "--store", tmp_path, "--out", tmp_path / "c.h5ad")
    assert list(tmp_path.iterdir()) == []
