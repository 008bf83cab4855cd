"""Which files and figures axis cases need, and what a config may not ask."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from perturbed.answers import where_answered
from perturbed.axis.spec import PAPER_B_AXIS
from perturbed.config import read_yaml
from perturbed.errors import ConfigError
from perturbed.plan import Plan

ROOT = Path(__file__).parents[1]
CASE = {
    "cells": "islets_simulated_demo",
    "model": "islets_simulated_demo",
    "unperturbed": {"column": "disease", "values": ["normal"]},
    "perturbed": {"column": "disease", "values": ["type 2 diabetes mellitus"]},
    "flows": [{"gene": "Ins1", "name": "Ins1_beta", "answers": ["paper_b_fig3"]}],
    "gene_sets": ["planted"],
    "answers": ["paper_b_islets"],
}
REAL = {**CASE, "cells": "mouse_islets_2023_12_15", "model": "census_scvi_mouse_2024_02_12", "gene_sets": []}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan(cases: dict) -> Plan:
    return Plan({"dataset": [], "methods": [], "splits": {}, "axes": cases})


def test_a_case_needs_no_dataset_of_the_benchmark():
    found = plan({"a": CASE})
    assert list(found.jobs()) == [] and found.table_folder() == []
    kinds = ["scores", "map", "umap", "pathways", "judge", "flow_Ins1_beta"]
    files = [*(f"{kind}.svg" for kind in kinds[:-1]), "table.html", f"{kinds[-1]}.svg"]
    assert found.figure_files() == [f"results/figures/axes/a/{file}" for file in files]
    with pytest.raises(ConfigError, match="name a dataset, or give `axes`"):
        plan({})


def test_simulated_cells_bring_model_truth_and_gene_sets():
    axes = plan({"a": CASE}).axes
    here = SimpleNamespace(axis="a")
    folder = "data/census/islets_simulated_demo"
    assert axes.score_input(here) == {
        "cells": f"{folder}/cells.h5ad",
        "model": f"{folder}/models/islets_simulated_demo",
        "truth": f"{folder}/truth.csv",
    }
    assert axes.library_options(here) == f"--gene-sets planted={folder}/gene_sets.gmt"
    assert axes.planted_input(here) == [f"{folder}/truth.csv"]


def test_real_cells_share_one_published_model():
    axes = plan({"a": REAL, "b": {**REAL, "answers": [], "flows": []}}).axes
    models = {axes.score_input(SimpleNamespace(axis=name))["model"] for name in "ab"}
    assert models == {"data/models/census_scvi_mouse_2024_02_12"}
    assert axes.kinds("b") == ["scores", "map", "umap"], "without gene sets there are no pathways to judge"


def test_a_saved_model_goes_the_way_of_published_ones(tmp_path):
    """So that it is checked against its card, with one line where it is missing."""
    (tmp_path / "saved.yaml").write_text(f"model: {{kind: path, folder: {tmp_path}}}\n")
    cards = {"model_cards": [str(tmp_path)], "dataset": [], "methods": [], "splits": {}}
    axes = Plan({**cards, "axes": {"a": {**REAL, "model": "saved"}}}).axes
    assert axes.fetched == ["saved"] and axes.fitted == []
    assert axes.score_input(SimpleNamespace(axis="a"))["model"] == "data/models/saved"
    assert axes.model_input(SimpleNamespace(decoder="saved")) == {}
    (tmp_path / "model.pt").write_bytes(b"")
    assert axes.model_input(SimpleNamespace(decoder="saved")) == {"saved": f"{tmp_path}/model.pt"}


def test_two_cases_can_share_one_fitted_model():
    matched = {
        **CASE,
        "cells": "islets_simulated_matched",
        "model_cells": "islets_simulated_demo",
        "answers": [],
        "flows": [],
    }
    axes = plan({"a": CASE, "b": matched}).axes
    models = {axes.score_input(SimpleNamespace(axis=name))["model"] for name in "ab"}
    assert len(models) == 1 and set(axes.cells) == {"islets_simulated_demo", "islets_simulated_matched"}


def test_optional_cases_are_drawn_only_when_asked_for():
    found = plan({"a": CASE, "b": {**CASE, "optional": True, "answers": [], "flows": []}})
    assert not any("/b/" in path for path in found.figure_files())
    assert any("/b/" in path for path in found.axes.targets())


def test_kept_answers_are_an_input_of_the_judge_that_replays_them():
    replay = {"provider": "replay", "replay": "kept/answers.jsonl", "model": "m"}
    axes = plan({"a": {**CASE, "judge": replay}, "b": {**CASE, "answers": [], "flows": []}}).axes
    assert axes.replay_input(SimpleNamespace(axis="a")) == ["kept/answers.jsonl"]
    assert axes.replay_input(SimpleNamespace(axis="b")) == []


def test_the_table_of_pathways_is_a_page_beside_the_papers_on_its_own_cells():
    item = "paper_b_table_pathways"
    axes = plan({"a": {**CASE, "answers": [item]}}).axes
    assert axes.answers[item] == ["results/figures/axes/a/table.html"]
    assert "--published" not in axes.draw_options("table")(SimpleNamespace(axis="a"))
    real = plan({"a": {**REAL, "answers": [item], "gene_sets": ["wikipathways_mouse_20240810"]}}).axes
    assert "--published config/published/" in real.draw_options("table")(SimpleNamespace(axis="a"))


def test_figures_answer_items_of_the_paper():
    axes = plan({"a": CASE}).axes
    assert axes.answers == {
        "paper_b_islets": ["results/figures/axes/a/map.svg"],
        "paper_b_fig3": ["results/figures/axes/a/flow_Ins1_beta.svg"],
    }
    assert set(axes.unanswered()) == set(PAPER_B_AXIS) - {"paper_b_islets", "paper_b_fig3"}
    assert "--configfile config/t2d_census.yaml" in where_answered("paper_b_flow_aldoa", Path("config"))


def test_every_item_of_the_paper_is_answered_by_the_shipped_configs():
    for name in ("config", "t2d_census"):
        assert Plan(read_yaml(ROOT / f"config/{name}.yaml")).axes.unanswered() == []


def test_published_cases_find_the_study_in_the_names_of_samples():
    """Names as the atlas' authors make them; all studies are one dataset."""
    cases = Plan(read_yaml(ROOT / "config/t2d_census.yaml")).axes.cases
    samples = {"STZ__G1": "STZ", "VSG__MUC13639": "VSG", "NOD_elimination__SRR7610295": "NOD_elimination"}
    for sample, study in samples.items():
        for case in cases.values():
            found = re.fullmatch(case.study.pattern, f"mouse_pancreatic_islet_atlas_Hrovatin__{sample}")
            assert case.study.column == "donor_id" and found["study"] == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": {"column": "donor_id", "pattern": "("}}, "'(' is no regular expression"),
        ({"cells": "islets_simulatd"}, "no card for 'islets_simulatd'"),
        ({"model": "islets"}, "no card for 'islets'"),
        ({"gene_sets": ["wikipathway"]}, "gene sets: no card for 'wikipathway'"),
        ({"gene_sets": ["planted"], "cells": "mouse_islets_minified"}, "axes.a.gene_sets: 'planted' are those of sim"),
        ({"answers": ["paper_b_figure3"]}, "axes.a: no such item 'paper_b_figure3'; did you mean 'paper_b_fig3'"),
        ({"answers": ["paper_b_fig3"]}, "axes.a.answers: 'paper_b_fig3' is a flow"),
        ({"flows": [{"gene": "../x"}]}, "../x"),
        ({"axis": "given"}, "`given`, the file, goes with `axis: given`"),
        ({"tops": 3}, "axes.a.tops"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(changes, message):
    with pytest.raises(ConfigError) as caught:
        plan({"a": {**CASE, **changes}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_cases_do_not_answer_one_item():
    with pytest.raises(ConfigError, match="'paper_b_islets' is answered by 'a' already"):
        plan({"a": CASE, "b": {**CASE, "flows": []}})
