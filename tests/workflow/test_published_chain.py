"""`config/t2d_census.yaml` to its figures: the shipped cards with the addresses of stand-ins, nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import h5py
import pandas as pd
import pytest
import yaml
from atlas_world import DATASET, write_world
from pipeline import ROOT, Run

from file_server import serve_files
from perturbed.files import hash_file

pytestmark = pytest.mark.workflow
QUICK = {
    "judged": ["type B pancreatic cell"], "n_cells": 60, "n_bootstrap": 100, "n_permutations": 99, "top": 60,
    "enrichment": {"n_null": 20},
}  # fmt: skip


def configure(run: Run, cards: dict[str, list[str]]) -> None:
    config = yaml.safe_load((ROOT / "config/t2d_census.yaml").read_text())
    for case in config["axes"].values():
        case |= QUICK
        case["flows"] = case.get("flows", [])[:2]  # each is a job; the others differ in their gene
    config |= {**cards, "method_files": [str(ROOT / "config/methods")], "results": "results", "allow_unpinned": True}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))


CASES = ("t2d", "t2d_matched", "t2d_latents")
KINDS = ("scores", "map", "umap", "pathways", "judge", "flow_Ins1_beta")
DRAWN = [f"results/figures/axes/t2d/{kind}.svg" for kind in KINDS]
DRAWN += [f"results/figures/axes/{case}/{kind}.svg" for case in CASES[1:] for kind in ("scores", "pathways")]
"""Every figure of the paper's case; of the others those that hold scores and pathways."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Every case of the configuration, from cards to figures."""
    run = Run(tmp_path_factory.mktemp("published"))
    with serve_files() as server:
        configure(run, write_world(run.folder, server))
        run.snakemake("--", *DRAWN, env={"PERTURBED_ALLOW_LOCALHOST": "1"})
        yield run


def table(run: Run, case: str, name: str) -> pd.DataFrame:
    return pd.read_csv(run.folder / f"results/axes/{case}/tables/{name}.csv")


def test_figures_are_drawn_from_what_the_cards_name(made: Run) -> None:
    assert all((made.folder / figure).stat().st_size > 1000 for figure in DRAWN)
    assert "Nothing to be done" in made.snakemake("--", *DRAWN)
    for case in CASES:
        verdicts = pd.read_csv(made.folder / f"results/axes/{case}/judgement/verdicts.csv")
        assert (verdicts["verdict"] == "not judged").all() and len(verdicts) > 10
    cells = made.folder / "data/census/mouse_islets_h5ad_matched/cells.h5ad"
    with h5py.File(cells, "r") as file:
        assert json.loads(file["uns/provenance"].asstr()[()])["dataset_ids"] == [DATASET]


def test_studies_are_read_from_the_samples_names(made: Run) -> None:
    naive = table(made, "t2d", "permutation")
    assert (naive["exchanged"] == "within studies (2 of 4 have donors in both arms)").all()
    assert table(made, "t2d", "lists").set_index("list").loc["pseudobulk", "adjusted"] == "for studies"
    matched = table(made, "t2d_matched", "permutation")
    assert (matched["n_possible"] == 12).all() and (matched["p"] >= 1 / 12 - 1e-6).all()
    assert table(made, "t2d_matched", "arms")["n_donors"].tolist() == [3, 3]


def test_latents_alone_are_scored_by_symbols_and_say_what_is_absent(made: Run) -> None:
    """Genes of the minified file are ids; symbols come from the card's table, for flows and gene sets alike."""
    lists = table(made, "t2d_latents", "lists").set_index("list")
    assert lists.loc["pseudobulk", "note"].startswith("absent: the cells came with latents")
    ranking = table(made, "t2d_latents", "rankings").drop_duplicates("gene").set_index("gene")["symbol"]
    assert ranking["ENSMUSG99000000001"] == "Ins1"
    sets = made.folder / "data/census/mouse_islets_minified/gene_sets"
    for library in ("wikipathways_mouse_20240810", "reactome_mouse"):
        mapping = pd.read_csv(sets / f"{library}.mapping.csv")
        assert len(mapping) > 100, library
    assert (made.folder / "results/axes/t2d_latents/enrichment").is_dir()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"expect": {"n_genes": 8000}}, "saved: expect.n_genes: the card says 8,000, the model has 800"),
        ({"folder": "nowhere"}, "saved: model.folder: nowhere/model.pt: no such file; give the folder that scvi-tools"),
        ({}, ""),
    ],
    ids=["not expected", "missing", "right"],
)
def test_a_saved_model_is_checked_before_it_is_used(made: Run, card: dict, message: str) -> None:
    """`kind: path` goes the way of published models, and nothing is scored before."""
    text = {"model": {"kind": "path", "folder": card.get("folder", "fitted")}, "expect": card.get("expect", {})}
    (made.folder / "models/saved.yaml").write_text(yaml.safe_dump(text))
    config = yaml.safe_load((made.folder / "config.yaml").read_text())
    case = config["axes"]["t2d_latents"] | {"model": "saved", "gene_sets": []}
    other = made.folder / "saved.yaml"
    other.write_text(yaml.safe_dump(config | {"axes": {"saved": case}}))
    target = "results/axes/saved/tables" if message else "data/models/saved"
    shown = made.snakemake("--configfile", str(other), "--", target, check=not message)
    if message:
        (line,) = {line for line in shown.splitlines() if line.startswith("perturbed: ")}
        assert message in line and "Traceback" not in shown
        assert not (made.folder / "data/models/saved").exists()
    else:
        record = json.loads((made.folder / "data/models/saved/model.json").read_text())
        assert record["kind"] == "path" and record["sha256"] == hash_file(made.folder / "fitted/model.pt")
