"""Side files in a real run: embeddings once they are there, gene sets by their card, a graph by its address."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import yaml
from pipeline import ROOT, Run

from file_server import FileServer, serve_files
from perturbed.data.cards import Card, SimulationSource
from perturbed.data.simulate import simulate

pytestmark = pytest.mark.workflow
GRAPH = b"source,target,importance\nG001,G002,0.5\n"
SETS = {"even": [f"G{i:03d}" for i in range(2, 61, 2)], "third": [f"G{i:03d}" for i in range(3, 61, 3)]}
HEADS = {
    name: {"method": "embedding_cells", "title": name, "files": {"cell_embedding": f"vectors/{{dataset}}/{name}.csv"}}
    for name in ("uce", "state")
}
STUDIES = {
    "heads": {
        "kind": "comparison", "title": "Heads", "answers": ["paper_a_table2"], "splits": ["heldout"],
        "methods": ["additive", "uce", "state"], "metrics": ["rmse_relative"],
        "published": str(ROOT / "config/published/paper_a.csv"),
    },
    "probed": {
        "kind": "probe", "title": "Probed", "answers": ["paper_a_fig1"], "dataset": "small", "split": "heldout",
        "methods": ["uce", "state"], "options": {"penalties": [0.01], "n_folds": 2, "inner_folds": 2, "min_cells": 6},
    },
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")
    with serve_files(**{"graph.csv": GRAPH}) as served:
        yield served


def write_cards(run: Run, server: FileServer) -> None:
    """The tiny screen with gene sets that a card names, and a graph that an address gives."""
    graph = {"name": "graph.csv", "urls": [server.url("graph.csv")], "sha256": hashlib.sha256(GRAPH).hexdigest()}
    card = yaml.safe_load((ROOT / "tests/configs/cards/tiny.yaml").read_text())
    library = {
        "source": {"kind": "path", "path": "sets.gmt"},
        "organism": "simulated",
        "name_pattern": "SET_(?P<name>.+)",
    }
    (run.folder / "sets.gmt").write_text("".join(f"SET_{k}\t\t" + "\t".join(names) + "\n" for k, names in SETS.items()))
    for folder, name, content in (
        ("cards", "small", {**card, "files": {"gene_sets": "known", "gene_graph": graph}}),
        ("libraries", "known", library),
    ):
        (run.folder / folder).mkdir()
        (run.folder / folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def test_heads_take_part_once_their_file_is_there_and_cards_name_what_is_fetched(new_run: Run, server: FileServer):
    write_cards(new_run, server)
    splits = {"heldout": {"kind": "heldout_cells", "n_perturbations": 4, "n_cells": 8, "min_cells": 10}}
    new_run.configure(
        dataset="small", cards=["cards"], gene_set_cards=["libraries"], splits=splits, methods=["additive"],
        variants=HEADS, method_seeds={}, studies=STUDIES, seeds=[0],
        statistics={"n_bootstrap": 200, "primary_method": "uce", "baselines": ["additive"]},
        evaluation={"max_cells": 8, "references": False},
    )  # fmt: skip
    assert "studies.probed: no dataset, split and method" in new_run.snakemake(check=False)  # no head is there yet
    (new_run.folder / "vectors/small").mkdir(parents=True)
    write_vectors(new_run)
    targets = ("paper_a_table2", "paper_a_fig1", "data/small/gene_graph.csv", "data/small/gene_sets/known.gmt")
    said = new_run.snakemake(*targets)
    why = "needs cell embedding; vectors/small/state.csv is not there"
    assert f"perturbed: state is left out on small (paper_a_table2, paper_a_fig1): {why}" in said
    assert (new_run.folder / "data/small/gene_graph.csv").read_bytes() == GRAPH
    studies = new_run.folder / "results/studies"
    table = pd.read_csv(studies / "heads/table.csv").set_index("method")
    assert np.isfinite(table.loc["uce", "mean"]) and "state" not in table.index
    probed = pd.read_csv(studies / "probed/table.csv")
    assert set(probed["method"]) == {"pca", "genes", "uce"}
    assert probed.set_index("method").loc["uce", "n_dimensions"].eq(5).all()
    assert (new_run.folder / "data/small/gene_sets/known.gmt").read_text().startswith("even\t")
    assert "Nothing to be done" in new_run.snakemake(*targets)


def write_vectors(run: Run) -> None:
    """Vectors of all cells, made without labels: five random directions of the counts."""
    source = Card.model_validate(yaml.safe_load((run.folder / "cards/small.yaml").read_text())).source
    assert isinstance(source, SimulationSource)
    raw = simulate(source, "small")[0]
    directions = np.random.default_rng(0).normal(size=(raw.n_vars, 5))
    pd.DataFrame(raw.X @ directions, index=raw.obs_names).to_csv(run.folder / "vectors/small/uce.csv")
