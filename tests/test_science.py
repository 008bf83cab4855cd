"""The claims of the pipeline on planted truth: what must be recovered is, and a null comes out null.

One simulated screen, small enough to train on in a test, judged with the pipeline's own scores and intervals.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbed.config import EvaluationSpec, FeatureSpec, StatisticsSpec, UnseenCombo, parse, read_yaml
from perturbed.data.cards import Card
from perturbed.data.contracts import (
    read_prepared,
    read_split,
    write_features,
    write_h5ad,
    write_scores,
    write_split,
)
from perturbed.data.features import compute_features
from perturbed.data.prepare import prepare
from perturbed.data.simulate import write_simulation
from perturbed.data.split import make_split
from perturbed.evaluation.evaluate import evaluate
from perturbed.evaluation.references import score_references
from perturbed.evaluation.statistics import arrange, contrast
from perturbed.evaluation.summarise import summarise
from perturbed.models.base import FitRun, TrainingData, build
from perturbed.models.inputs import load_training_data
from perturbed.models.spec import load_method_spec
from perturbed.names import CONTROL

ROOT = Path(__file__).parents[1]
SPEC = EvaluationSpec(metrics=("pearson_delta_ctrl", "pearson_delta_pert", "l2_delta", "pds_l1"), n_halves=2)
VAE = {"n_nu": 10, "n_iota": 20, "n_hidden": 64, "epochs": 60, "lr": 2e-3, "batch_size": 128}


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    """The default screen with fewer genes, from card to features."""
    folder = tmp_path_factory.mktemp("screen")
    content = read_yaml(ROOT / "config/datasets/simulation.yaml")
    content["source"]["params"] |= {"n_genes": 300, "n_perturbed_genes": 30, "n_doubles": 30, "n_truth_cells": 500}
    content["expect"] = {}
    card = parse(Card, content, "card")
    write_simulation(card.source, "screen", folder / "raw.h5ad", folder / "truth.h5ad")
    write_h5ad(folder / "prepared.h5ad", prepare(folder / "raw.h5ad", card, "screen"))
    prepared = read_prepared(folder / "prepared.h5ad")
    write_split(
        folder / "split.csv",
        make_split(prepared.obs, UnseenCombo(kind="unseen_combo"), 0, dataset="screen", name="zero_shot"),
    )
    features = compute_features(prepared, read_split(folder / "split.csv"), FeatureSpec(n_hvg="all", n_pcs=20))
    write_features(folder / "features.csv", features)
    return folder


def files(screen: Path) -> dict[str, Path]:
    return {"prepared": screen / "prepared.h5ad", "split": screen / "split.csv"}


def fit_and_score(screen: Path, method: str, data: TrainingData, seed: int = 0) -> pd.DataFrame:
    fitted = build(load_method_spec(method, [ROOT / "config/methods"]), VAE if method == "perturbedvae" else {})
    fitted.fit(data, FitRun(seed=seed, progress=False))
    split = read_split(screen / "split.csv").table
    tested = sorted(set(split.loc[(split["part"] == "test") & (split["perturbation"] != CONTROL), "perturbation"]))
    prediction = fitted.predict([(name, "all") for name in tested], seed=seed)
    meta = {"dataset": "screen", "split": "zero_shot", "fold": 0, "method": method, "seed": seed}
    return evaluate(**files(screen), prediction=prediction, spec=SPEC, features=screen / "features.csv", meta=meta)


def judge(tables: list[pd.DataFrame], out: Path, baselines: tuple[str, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    write_scores(out / "scores.parquet", pd.concat(tables))
    spec = StatisticsSpec(baselines=baselines, primary_baseline="mean_effect", n_bootstrap=1000)
    summarise([out / "scores.parquet"], spec, out / "tables")
    return pd.read_csv(out / "tables/contrasts.csv"), pd.read_csv(out / "tables/summary.csv").set_index(
        ["method", "metric"]
    )


def difference(contrasts: pd.DataFrame, method: str, baseline: str, metric: str) -> pd.Series:
    wanted = (contrasts["method"] == method) & (contrasts["baseline"] == baseline) & (contrasts["metric"] == metric)
    (row,) = contrasts[wanted].index
    return contrasts.loc[row]


def test_oracle_beats_perturbedvae_beats_the_floors(screen, tmp_path):
    data = load_training_data(screen / "prepared.h5ad", screen / "split.csv", screen / "features.csv")
    tables = [fit_and_score(screen, method, data) for method in ("no_change", "mean_effect", "additive")]
    tables += [fit_and_score(screen, "perturbedvae", data, seed) for seed in (0, 1)]
    tables.append(
        score_references(**files(screen), features=screen / "features.csv", spec=SPEC, truth=screen / "truth.h5ad")
    )
    contrasts, summary = judge(tables, tmp_path, ("no_change", "mean_effect", "additive"))
    assert difference(contrasts, "perturbedvae", "mean_effect", "pearson_delta_ctrl")["ci_low"] > 0
    assert difference(contrasts, "perturbedvae", "no_change", "l2_delta")["ci_low"] > 0  # oriented: above 0 is better
    (grid,) = arrange(pd.concat(tables), StatisticsSpec(n_bootstrap=1000))
    assert contrast(grid, "noise_free", "perturbedvae", "pearson_delta_ctrl", 1).difference.low > 0
    value = summary["mean"]
    assert value["noise_free", "pearson_delta_ctrl"] > value["perturbedvae", "pearson_delta_ctrl"]
    assert value["noise_free", "pearson_delta_ctrl"] > value["additive", "pearson_delta_ctrl"]
    assert value["noise_free", "l2_delta"] < value["perturbedvae", "l2_delta"]


@pytest.mark.parametrize("method", ["additive", "perturbedvae"])
def test_permuted_labels_know_nothing(screen, tmp_path, method):
    """Labels permuted among the perturbed training cells: only what all perturbations share is left to learn."""
    data = load_training_data(screen / "prepared.h5ad", screen / "split.csv", screen / "features.csv")
    perturbed = data.perturbation != CONTROL
    labels = data.perturbation.copy()
    labels[perturbed] = np.random.default_rng(0).permutation(labels[perturbed])
    null = replace(data, perturbation=labels)
    tables = [fit_and_score(screen, "mean_effect", null)]
    tables += [fit_and_score(screen, method, null, seed) for seed in ((0, 1) if method == "perturbedvae" else (0,))]
    contrasts, summary = judge(tables, tmp_path, ("mean_effect",))
    assert difference(contrasts, method, "mean_effect", "pearson_delta_ctrl")["ci_low"] <= 0
    if method == "perturbedvae":  # additive still knows that doubles have two genes, and so twice what all share
        against_mean = summary.loc[(method, "pearson_delta_pert")]
        assert against_mean["ci_low"] <= 0 <= against_mean["ci_high"]
    discrimination = summary.loc[(method, "pds_l1")]
    assert discrimination["ci_low"] <= 0.5 <= discrimination["ci_high"]
