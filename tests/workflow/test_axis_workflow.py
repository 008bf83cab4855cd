"""The axis case of the demo in the real Snakemake: what was planted is found, and what was not is not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pipeline import ROOT, Run

sys.path.append(str(ROOT / "tests/pathways"))
from judge_server import JudgeServer, asked_about, verdict

pytestmark = pytest.mark.workflow
CASE = "t2d_demo"


def configure(run: Run, **changes: Any) -> None:
    case = yaml.safe_load((ROOT / "config/config.yaml").read_text())["axes"][CASE] | changes
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
    # Means of 200 permutations whose own values lie anywhere from 0 to 1: three standard errors are 0.1.
    assert len(permuted) == 2 and permuted.between(0.4, 0.6).all()
    assert table.set_index("list")["value"]["gradient_unperturbed"] > 0.95


def test_enrichment_finds_the_planted_pathways_and_no_others(axes):
    table = pd.read_csv(axes / "enrichment/enrichment.csv").query("method == 'ora'")
    library = (axes.parents[2] / "data/census/islets_simulated_demo/gene_sets.gmt").read_text().splitlines()
    kind = dict(line.split("\t")[:2] for line in library)  # planted, trap or decoy
    planted = {name for name, what in kind.items() if what == "planted"}
    assert len(planted) == 5 and {"trap", "decoy"} < set(kind.values())
    for (name, _), tested in table.groupby(["list", "background"]):
        found = set(tested.loc[tested["fdr"] <= 0.05, "pathway"])
        if name.startswith("gradient_"):
            assert found == planted, name
            assert (tested[tested["pathway"].map(kind) == "trap"]["fdr"] > 0.5).all()
        if name == "random":
            assert not found


def test_nobody_was_asked_and_the_tables_say_so(axes):
    assert (pd.read_csv(axes / "judgement/verdicts.csv")["verdict"] == "not judged").all()
    assert not (axes / "answers.jsonl").exists()


def judgement(folder: Path) -> dict[str, bytes]:
    """Tables and figures that show what a judge said; `cost.json` names the provider."""
    drawn = [folder / f"results/figures/axes/{CASE}/{name}" for name in ("judge.svg", "pathways.svg", "table.html")]
    tables = (folder / f"results/axes/{CASE}/judgement").glob("*.csv")
    return {path.name: path.read_bytes() for path in [*tables, *drawn]}


def test_answers_of_a_server_are_replayed_without_it_or_a_key(axes, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(axes.parents[2], run.folder, symlinks=True)
    asked = {"model": "tiny", "key_env": "OPENAI_TEST_KEY", "n_votes": 3, "seed": 1}
    target = [f"results/figures/axes/{CASE}/{name}" for name in ("judge.svg", "pathways.svg", "table.html")]

    def script(request: dict[str, Any], before: int) -> dict[str, Any]:
        return verdict("no" if asked_about(request).startswith("decoy") and request["seed"] % 5 else "yes")

    with JudgeServer(script) as server:
        configure(run, judge={"provider": "openai", "base_url": server.url, **asked})
        run.snakemake("--", *target, env={"OPENAI_TEST_KEY": "sk-of-a-test-0123456789"})
    first, kept = judgement(run.folder), run.folder / "kept.jsonl"
    odds = pd.read_csv(run.folder / f"results/axes/{CASE}/judgement/odds.csv").set_index("list")
    assert len(server.requests) > 300 and odds.loc["gradient lists", "low"] > 1

    shutil.move(run.folder / f"results/axes/{CASE}/answers.jsonl", kept)
    configure(run, judge={"provider": "replay", "replay": kept.name, **asked})
    assert run.planned("--", *target)["judge"] == 1
    run.snakemake("--", *target)
    assert judgement(run.folder) == first
    assert run.planned("--", *target) == {}

    kept.write_text(kept.read_text().replace('"confidence": 0.8', '"confidence": 0.9'))
    assert run.planned("--", *target)["judge"] == 1, "other answers, another judgement"


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
    assert jobs["fetch_census_model"] == 1 and jobs["query_census"] == jobs["score_genes"] == 3
    assert "simulate_census" not in jobs and "fit_census_model" not in jobs
    assert new_run.planned("--", "paper_b_fig3")["draw_axis_flow"] == 2
