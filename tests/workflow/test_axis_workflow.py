"""The axis case of the demo in the real Snakemake: what was planted is found, and what was not is not."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from pipeline import ROOT, Run

pytestmark = pytest.mark.workflow
CASE = "t2d_demo"


def configure(run: Run) -> None:
    case = yaml.safe_load((ROOT / "config/config.yaml").read_text())["axes"][CASE]
    folders = {
        "census_cards": "census",
        "model_cards": "models",
        "gene_set_cards": "gene_sets",
        "method_files": "methods",
    }
    config = {"dataset": [], "methods": [], "splits": {}, "axes": {CASE: case}, "results": "results"}
    config |= {key: [str(ROOT / f"config/{name}")] for key, name in folders.items()}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def axes(tmp_path_factory) -> Path:
    run = Run(tmp_path_factory.mktemp("axis"))
    configure(run)
    run.snakemake("--", "t2d")
    assert "Nothing to be done" in run.snakemake("--", "t2d")
    return run.folder / "results/axes" / CASE


def test_gradients_find_the_planted_genes_and_beat_the_papers_baseline(axes):
    table = pd.read_csv(axes / "tables/planted.csv").query("group == 'all'")
    recovery = table[table["measure"] == "auprc"].set_index("list")["value"]
    chance = table["chance"].iloc[0]
    for arm in ("unperturbed", "perturbed"):
        assert recovery[f"gradient_{arm}"] >= 0.8
        assert recovery[f"gradient_{arm}"] > recovery["median_decoded"] + 0.05
    assert abs(recovery["random"] - chance) < 0.1


def test_permuted_labels_say_nothing_of_the_direction(axes):
    table = pd.read_csv(axes / "tables/planted.csv").query("group == 'all' and measure == 'auroc_direction'")
    permuted = table[table["list"].str.contains("permuted")]["value"]
    assert len(permuted) == 2 and permuted.between(0.3, 0.7).all()
    assert table.set_index("list")["value"]["gradient_unperturbed"] > 0.95


def test_enrichment_finds_planted_pathways_and_no_others(axes):
    table = pd.read_csv(axes / "enrichment/planted.csv").query("method == 'ora' and criterion == 'fdr'")
    found = table[table["background"] == "model"].set_index("list")
    for arm in ("unperturbed", "perturbed"):
        row = found.loc[f"gradient_{arm}"]
        assert row["sensitivity"] >= 0.6 and row["n_false"] <= 1
    assert found.loc["random", "n_found"] == found.loc["random", "n_false"] == 0


def test_nobody_was_asked_and_the_tables_say_so(axes):
    assert (pd.read_csv(axes / "judgement/verdicts.csv")["verdict"] == "not judged").all()
    assert not (axes / "answers.jsonl").exists()


def test_the_published_cells_and_model_are_planned(new_run):
    config = yaml.safe_load((ROOT / "config/t2d_census.yaml").read_text())
    folders = {
        "census_cards": "census",
        "model_cards": "models",
        "gene_set_cards": "gene_sets",
        "method_files": "methods",
    }
    config |= {key: [str(ROOT / f"config/{name}")] for key, name in folders.items()}
    (new_run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    jobs = new_run.planned("--", "t2d")
    assert jobs["fetch_census_model"] == 1 and jobs["query_census"] == jobs["score_genes"] == 2
    assert "simulate_census" not in jobs and "fit_census_model" not in jobs
    assert new_run.planned("--", "paper_b_fig3")["draw_axis_flow"] == 2
