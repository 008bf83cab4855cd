"""Names from data are data in every stage: nothing is executed, no file appears elsewhere, and every name stays."""

from __future__ import annotations

import json
import re

import anndata
import pandas as pd
import pytest
from pipeline import Run

from hostile_world import CONTEXTS, PERTURBED, harm_done, write_hostile

pytestmark = pytest.mark.workflow

SECRET = "sk-never-to-be-seen-4711"
FLOW = {
    "dataset": "hostile", "split": "zero_shot", "method": "headed", "unperturbed": {"values": ["control"]},
    "perturbed": {"values": [PERTURBED[0]]}, "moves": [{"targets": ["perturbed"]}], "genes": list(PERTURBED[1:3]),
    "groups": "context", "masked_groups": True, "judged": list(CONTEXTS), "title": "a;touch harm",
    "min_cells": 5, "n_steps": 3, "n_random_genes": 5, "n_bootstrap": 100, "n_permutations": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("hostile") / "run")
    run.folder.mkdir()
    write_hostile(run.folder / "source.h5ad")
    keys = {"context": "context", "keep": {"batch": "batch"}}
    card = {"source": {"kind": "path", "path": "source.h5ad"}, "keys": keys}
    (run.folder / "hostile.yaml").write_text(json.dumps(card))
    statistics = {"primary_method": "additive", "primary_baseline": "mean_effect", "baselines": ["no_change"]}
    heads = {"perturbed": {"column": "perturbation", "positive": [PERTURBED[0]]}}
    decoder = {"n_latent": 3, "hidden": [8], "batch_size": 64, "epochs": 3, "min_epochs": 1, "heads": heads}
    study = {"kind": "comparison", "title": "$(touch harm)", "splits": ["zero_shot"], "methods": ["additive"],
             "metrics": ["rmse_relative"], "top_expressed": 5}  # fmt: skip
    run.configure(
        dataset=["hostile"], cards=["."], methods=["no_change", "mean_effect", "additive", "perturbedvae"],
        variants={"headed": {"method": "nb_vae", "params": decoder}}, method_seeds={}, seeds=[0],
        method_params={"perturbedvae": {"n_nu": 4, "n_iota": 6, "n_hidden": 8, "epochs": 2}},
        studies={"shown": study}, gradients={"flow": FLOW}, statistics={**statistics, "n_bootstrap": 200},
    )  # fmt: skip
    run.snakemake(env={"PERTURBED_TEST_SECRET": SECRET, "OPENAI_API_KEY": SECRET})
    return run


def test_nothing_is_executed_and_no_file_appears_elsewhere(hostile_run: Run):
    assert harm_done(hostile_run.folder) == []
    known = {"run"}
    assert {path.name for path in hostile_run.folder.parent.iterdir()} == known
    top = {path.name for path in hostile_run.folder.iterdir()}
    assert top == {".snakemake", "config.yaml", "data", "hostile.yaml", "results", "source.h5ad"}


def test_every_name_stays_as_it_is(hostile_run: Run):
    prepared = anndata.read_h5ad(hostile_run.folder / "data/hostile/prepared.h5ad", backed="r")
    source = anndata.read_h5ad(hostile_run.folder / "source.h5ad", backed="r")
    assert list(prepared.var_names) == list(source.var_names)
    assert list(prepared.obs_names) == list(source.obs_names)
    assert set(prepared.obs["context"]) == set(CONTEXTS)
    scores = pd.read_parquet(hostile_run.folder / "results/tables/scores.parquet")
    tested = {"+".join(sorted((PERTURBED[i], PERTURBED[j]))) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (2, 5))}
    assert set(scores["perturbation"]) == {*tested, "*"}  # the star stands for all
    scores = scores[scores["perturbation"] != "*"]
    assert set(scores["context"]) == set(CONTEXTS)
    additive = scores[(scores["method"] == "additive") & (scores["metric"] == "rmse")]
    assert additive["value"].notna().all() and len(additive) == len(tested) * len(CONTEXTS)


def test_a_network_a_flow_and_a_study_take_names_as_they_are(hostile_run: Run):
    results = hostile_run.folder / "results"
    scores = pd.read_parquet(results / "tables/scores.parquet")
    fitted = scores[(scores["method"] == "perturbedvae") & (scores["metric"] == "rmse")]
    assert fitted["value"].notna().all() and set(fitted["context"]) == set(CONTEXTS)
    flows = [path for path in (results / "gradients/flow/tables").glob("*.csv") if CONTEXTS[0] in path.read_text()]
    assert flows, "no table names the group"
    assert (results / "studies/shown/table.csv").is_file() and (results / "figures/studies/shown.svg").is_file()


def test_figures_and_report_hold_no_markup_from_names(hostile_run: Run):
    figures = list(hostile_run.folder.glob("results/figures/**/*.svg"))
    assert len(figures) >= 7
    for path in figures:
        assert "<script>harm" not in path.read_text(), path
    assert "<script>harm" not in (hostile_run.folder / "results/report.html").read_text()


def test_no_secret_of_the_environment_is_written_anywhere(hostile_run: Run):
    """Neither in logs, records, tables nor the report; Snakemake's own records of the run included."""
    seen = [
        path.relative_to(hostile_run.folder)
        for path in hostile_run.folder.rglob("*")
        if path.is_file() and re.search(SECRET.encode(), path.read_bytes())
    ]
    assert seen == []
