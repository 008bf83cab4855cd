"""Which fits and figures gradient cases need, and what a config may not ask."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from perturbed.answers import where_answered
from perturbed.config import read_yaml
from perturbed.errors import ConfigError
from perturbed.gradient_plan import slug
from perturbed.plan import Plan

ROOT = Path(__file__).parents[1]
HEADS = {"stimulated": {"column": "perturbation", "positive": ["stim"]}}
CASE = {
    "dataset": "kang2018",
    "split": "cells",
    "method": "stimulated",
    "moves": [{"targets": ["stimulated"]}],
    "unperturbed": {"values": ["control"]},
    "perturbed": {"values": ["stim"]},
}
MASKED = {**CASE, "groups": "context", "masked_groups": True, "judged": ["B cells", "CD14+ Monocytes"], "seeds": 2}
SCREEN = {**CASE, "moves": [], "perturbed": None, "screen": True, "dataset": "simulation", "method": "nb_vae"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan(cases, **changes) -> Plan:
    config = {
        "dataset": ["simulation", "kang2018"],
        "methods": ["no_change"],
        "seeds": [0, 1, 2],
        "splits": {"cells": {"kind": "random_cells", "methods": []}},
        "variants": {"stimulated": {"method": "nb_vae", "params": {"heads": HEADS}}},
        "statistics": {"primary_method": "additive"},
        "gradients": cases,
    }
    return Plan({**config, **changes})


def test_one_fit_for_each_seed_and_none_of_them_is_scored():
    found = plan({"a": CASE})
    flows = found.gradients.flows(SimpleNamespace(case="a"))
    assert flows == [f"results/gradients/a/all/seed{seed}" for seed in (0, 1, 2)]
    files = found.gradients.flow_input(SimpleNamespace(case="a", part="all", seed="1"))
    assert files["model"] == "results/kang2018/cells/fold0/stimulated/seed1/model" and "truth" not in files
    assert list(found.jobs()) == [] and found.score_files() == []
    assert "tables" not in " ".join(found.table_folder()), "there is no benchmark"


def test_masked_groups_are_one_variant_each_with_its_labels_hidden():
    found = plan({"a": MASKED})
    here = SimpleNamespace(case="a", part="cd14_monocytes", seed="0")
    assert found.gradients.flow_input(here)["model"].split("/")[-3] == "stimulated-masks-cd14_monocytes"
    assert found.gradients.options(here, SimpleNamespace()) == "--judged 'CD14+ Monocytes'"
    params = json.loads(found.method_slice(SimpleNamespace(method="stimulated-masks-cd14_monocytes")))["params"]
    assert params["heads"]["stimulated"]["mask"] == {"context": ["CD14+ Monocytes"]}
    assert json.loads(found.method_slice(SimpleNamespace(method="stimulated")))["params"]["heads"] == HEADS
    flows = found.gradients.flows(SimpleNamespace(case="a"))
    assert len(flows) == 4 and found.gradients.parts == ["b_cells", "cd14_monocytes"]
    assert "masks" not in found.capability_slice()


def test_a_simulated_screen_is_given_the_truth():
    found = plan({"a": SCREEN})
    here = SimpleNamespace(case="a", part="all", seed="0")
    truth = found.gradients.flow_input(here)["truth"]
    assert truth == "data/simulation/truth.h5ad"
    assert found.gradients.options(here, SimpleNamespace(truth=truth)).strip() == f"--truth {truth}"
    assert found.gradients.kinds("a") == ["screen"]


def test_titles_and_answers_change_no_table():
    one = plan({"a": CASE}).gradients
    other = plan({"a": {**CASE, "title": "t", "answers": ["paper_b_quality"], "seeds": 1}}).gradients
    here = SimpleNamespace(case="a")
    assert one.slice(here) == other.slice(here)
    assert one.slice(here) != plan({"a": {**CASE, "delta": 0.1}}).gradients.slice(here)


def test_answers_are_targets():
    deep = {**CASE, "umap": True, "answers": ["paper_b_irf8_umap"]}
    found = plan({"a": {**CASE, "answers": ["paper_b_irf8_flow", "paper_b_quality"]}, "b": deep}).gradients
    assert found.answers == {
        "paper_b_irf8_flow": "results/figures/gradients/a/flow.svg",
        "paper_b_quality": "results/figures/gradients/quality.svg",
        "paper_b_irf8_umap": "results/figures/gradients/b/umap.svg",
    }
    assert found.unanswered() == ["paper_b_cardiotoxin", "paper_b_celegans"]
    assert "config/paper_b.yaml does" in where_answered("paper_b_cardiotoxin", ROOT / "config").replace(f"{ROOT}/", "")


def test_another_dataset_leaves_the_case_out_and_says_so():
    found = plan({"a": CASE, "b": SCREEN}, dataset=["simulation"])
    assert list(found.gradients.cases) == ["b"]
    assert "gradient case a is left out, because kang2018 is not in this run" in found.left_out()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "kang2019"}, "gradients.a.dataset: no card 'kang2019'; did you mean 'kang2018'?"),
        ({"split": "cell"}, "gradients.a.split: no split 'cell'; did you mean 'cells'?"),
        ({"method": "nb_vea"}, "nb_vae"),
        ({"answers": ["paper_b_irf8"]}, "no such item 'paper_b_irf8'"),
        ({"answers": ["paper_b_irf8_umap"]}, "set `umap: true`"),
        ({"moves": []}, "give either `moves` or `screen: true`"),
        ({"masked_groups": True}, "masked_groups needs"),
        ({"unperturbed": {"valuse": ["control"]}}, "did you mean 'values'?"),
        ({**MASKED, "method": "nb_vae"}, "nb_vae has no `heads` to mask"),
        ({**MASKED, "judged": ["B cells", "b-cells"]}, "two groups have the same letters and digits"),
    ],
)
def test_mistakes_are_one_line_that_names_the_case(change, message):
    with pytest.raises(ConfigError) as caught:
        plan({"a": {**CASE, **change}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_cannot_be_masked_twice_under_one_name():
    with pytest.raises(ConfigError, match="of another column is masked"):
        plan({"a": MASKED, "b": {**MASKED, "groups": "origin"}})


def test_slugs_are_safe_in_paths():
    assert slug("CD14+ Monocytes (a)") == "cd14_monocytes_a"


@pytest.mark.parametrize("name", ["gradients_shared", "paper_b", "config"])
def test_shipped_configs_are_valid(name):
    found = Plan(read_yaml(ROOT / f"config/{name}.yaml"))
    assert found.gradients.figures()


def test_features_differ_by_dataset():
    found = plan({}, dataset_features={"kang2018": {"n_hvg": 7}})
    slices = {
        name: json.loads(found.feature_slice(SimpleNamespace(dataset=name))) for name in ("kang2018", "simulation")
    }
    assert slices["kang2018"]["n_hvg"] == 7 and slices["simulation"]["n_hvg"] == 5000
    with pytest.raises(ConfigError, match="did you mean 'n_hvg'"):
        plan({}, dataset_features={"kang2018": {"nhvg": 7}})
