"""The grid, and that each slice holds what a rule depends on and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from perturbed.models.base import method_class
from perturbed.models.spec import load_method_spec
from perturbed.plan import Plan

ROOT = Path(__file__).parents[1]
HERE = SimpleNamespace(dataset="simulation", split="zero_shot", fold="0", method="perturbedvae", seed="0")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_methods_without_randomness_run_once():
    jobs = list(Plan({"dataset": "simulation", "methods": ["additive", "perturbedvae"], "seeds": [0, 1, 2]}).jobs())
    assert [(job.method, job.seed) for job in jobs] == [
        ("additive", 0),
        *[("perturbedvae", seed) for seed in (0, 1, 2)],
    ]


def test_folds_and_methods_of_a_split():
    splits = {
        "a": {"kind": "unseen_combo", "folds": 3, "methods": ["additive"]},
        "b": {"kind": "context", "contexts": ["x", "y"]},
    }
    jobs = list(Plan({"dataset": "simulation", "methods": ["additive", "no_change"], "splits": splits}).jobs())
    assert sum(job.split == "a" for job in jobs) == 3
    assert sum(job.split == "b" for job in jobs) == 4


def test_slices_hold_only_what_is_used():
    plan = Plan({"method_params": {"perturbedvae": {"epochs": 3}}})
    other = Plan({"method_params": {"perturbedvae": {"epochs": 4}}, "statistics": {"n_bootstrap": 500}})
    assert json.loads(plan.method_slice(HERE))["params"]["epochs"] == 3
    assert plan.method_slice(HERE) != other.method_slice(HERE)
    assert plan.split_slice(HERE) == other.split_slice(HERE)
    assert plan.section("evaluation") == other.section("evaluation")
    assert plan.section("statistics") != other.section("statistics")
    additive = SimpleNamespace(**{**vars(HERE), "method": "additive"})
    assert plan.method_slice(additive) == other.method_slice(additive)


def test_which_methods_run_on_a_split_changes_no_split():
    one = Plan({"splits": {"zero_shot": {"kind": "unseen_combo", "methods": ["additive"]}}})
    assert one.split_slice(HERE) == Plan({"splits": {"zero_shot": {"kind": "unseen_combo"}}}).split_slice(HERE)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/methods/*.yaml")), ids=lambda path: path.stem)
def test_a_method_file_says_what_its_class_says(path):
    spec = load_method_spec(path.stem, [path.parent])
    assert spec.stochastic == method_class(spec).stochastic
