"""The strict configuration: mistakes are named, defaults and generated pages agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from perturbed.config import read_yaml
from perturbed.errors import ConfigError
from perturbed.plan import Plan
from perturbed.reference import reference_pages
from perturbed.run_config import RunConfig, load_config

ROOT = Path(__file__).parents[1]


def study(**changes):
    """A valid study, changed."""
    comparison = {"kind": "comparison", "title": "t", "splits": ["zero_shot"], "methods": ["additive"]}
    return {**comparison, "metrics": ["rmse"], **changes}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"seedz": [1]}, "unknown key 'seedz'; did you mean 'seeds'?"),
        ({"features": {"nhvg": 3}}, "unknown key 'features.nhvg'; did you mean 'n_hvg'?"),
        ({"splits": {"a": {"kind": "unseen_combo", "fold": 3}}}, "unknown key 'splits.a.fold'; did you mean 'folds'?"),
        ({"splits": {"a": {"kind": "unseen_combos"}}}, "splits.a: `kind` must be one of heldout_cells"),
        ({"splits": {"a": {}}}, "splits.a: `kind` must be one of"),
        ({"splits": {"a": {"kind": "unseen_combo", "train_fraction": 3}}}, "splits.a.train_fraction"),
        ({"seeds": "one"}, "seeds.0: Input should be a valid integer"),
        ({"seeds": []}, "seeds"),
        ({"statistics": {"n_boostrap": 10}}, "did you mean 'n_bootstrap'?"),
        ({"studies": {"a": {"kind": "sweeps"}}}, "studies.a: `kind` must be one of comparison"),
        ({"studies": {"a": {"kind": "conditions", "titel": "t"}}}, "'studies.a.titel'; did you mean 'title'?"),
        ({"device": "gpu"}, "device: Input should be 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(value, message):
    with pytest.raises(ConfigError) as caught:
        load_config(value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_word_swaps_the_dataset():
    assert load_config({"dataset": "kang2018"}).dataset == ("kang2018",)


def test_values_cannot_be_changed_after_reading():
    with pytest.raises(ValueError, match="frozen"):
        load_config({}).seeds = (1,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"dataset": "simulatoin"}, "no card for 'simulatoin'"),
        ({"methods": ["additve"]}, "did you mean 'additive'?"),
        ({"method_params": {"aditive": {}}}, "method_params: no method 'aditive'; did you mean 'additive'?"),
        ({"statistics": {"primary_baseline": "nothing"}}, "statistics.primary_baseline: no method 'nothing'"),
        ({"statistics": {"primary_metric": "pearson"}}, "statistics.primary_metric: no metric 'pearson'"),
        ({"evaluation": {"metrics": ["rmsee"]}}, "did you mean 'rmse'?"),
        ({"splits": {"a": {"kind": "unseen_combo", "methods": ["x"]}}}, "splits.a.methods: no method 'x'"),
        ({"method_seeds": {"aditive": 1}}, "method_seeds: no method 'aditive'; did you mean 'additive'?"),
        ({"studies": {"a": study(methods=["additve"])}}, "did you mean 'additive'?"),
        ({"studies": {"a": study(splits=["zero"])}}, "studies.a.splits: no split 'zero'; did you mean 'zero_shot'?"),
        (
            {"studies": {"a": study(datasets=["simulate"])}},
            "studies.a.datasets: no dataset 'simulate'; did you mean 'sim",
        ),
        ({"studies": {"a": study(metrics=["rmsee"])}}, "studies.a.metrics: no metric 'rmsee'; did you mean 'rmse'?"),
        ({"studies": {"a": study(answers=["paper_a_tabel4"])}}, "did you mean 'paper_a_table4'?"),
        ({"studies": {"a": study(answers=["table4"])}}, "studies.a.answers: 'table4' is no usable target"),
        (
            {"studies": {"a": study(methods=["gears"])}, "method_files": "config/methods"},
            "studies.a: no dataset, split",
        ),
        ({"studies": {"a/b": study()}}, "studies: 'a/b' is no usable name"),
        ({"splits": {}}, "at least one split"),
        ({"splits": {"a/b": {"kind": "unseen_combo"}}}, "splits: 'a/b' is no usable name"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(value, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        Plan(value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("config/*.yaml")), *sorted(ROOT.glob("tests/configs/*.yaml"))], ids=str
)
def test_shipped_configs_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = Plan(read_yaml(path))
    assert list(plan.jobs()) or plan.gradients.figures() or plan.axes.targets()


def test_missing_or_broken_yaml_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_yaml(broken)


@pytest.mark.parametrize("name", list(reference_pages()))
def test_generated_pages_agree_with_the_code(name):
    assert (ROOT / name).read_text() == reference_pages()[name], "run `make reference`"


def test_default_config_comments_every_top_level_key():
    text = (ROOT / "config/config.yaml").read_text()
    written = set(yaml.safe_load(text))
    hidden = {"method_seeds", "studies", "dataset_features", "mirror", "allow_unpinned", "cards", "method_files"}
    hidden |= {"census_cards", "model_cards", "gene_set_cards", "memory_gb"}
    assert written | hidden == set(RunConfig.model_fields)
