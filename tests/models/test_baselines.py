from __future__ import annotations

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_cells import only, plant
from scipy import sparse

from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, MethodSpec, TrainingData, load_model, save_model
from perturbed.models.baselines import (
    Additive,
    MatchingMean,
    MeanEffect,
    NoChange,
    PcaRidge,
    PcaRidgeParams,
    average_conditions,
)

CONTEXTS = ("a", "b")


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return plant(contexts=CONTEXTS, n_cells=7, n_control=9, combos=("G00+G01",)).data


def slow_mean(data: TrainingData, perturbation: str, context: str) -> np.ndarray:
    """Cell by cell, gene by gene."""
    dense = data.X.toarray().astype(float)
    total, n = np.zeros(len(data.genes)), 0
    for i in range(len(dense)):
        if data.perturbation[i] == perturbation and data.context[i] == context:
            total += dense[i]
            n += 1
    return total / n


def slow_effect(data: TrainingData, perturbation: str) -> np.ndarray:
    return np.mean([slow_mean(data, perturbation, c) - slow_mean(data, "control", c) for c in CONTEXTS], axis=0)


def perturbations(data: TrainingData) -> list[str]:
    return sorted(set(data.perturbation) - {"control"})


def fitted(method, data):
    method.fit(data, FitRun())
    return method


def effect_of(method, perturbation, context="b"):
    return method.predict_one(perturbation, context)["mean"] - method.predict_one("control", context)["mean"]


def test_condition_means_match_a_loop_over_cells_and_stay_float64(data):
    means, conditions = average_conditions(data)
    assert means.dtype == np.float64
    for row, (perturbation, context) in zip(means, conditions):
        np.testing.assert_allclose(row, slow_mean(data, perturbation, context), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [NoChange, MeanEffect, Additive, MatchingMean, PcaRidge])
def test_control_is_predicted_by_the_control_mean_of_its_context(data, cls):
    method = fitted(cls(), data)
    for context in CONTEXTS:
        np.testing.assert_allclose(
            method.predict_one("control", context)["mean"], slow_mean(data, "control", context), atol=1e-12
        )


def test_no_change_has_no_effect(data):
    assert not effect_of(fitted(NoChange(), data), "G03").any()


def test_mean_effect_weighs_perturbations_not_cells(data):
    # drop most cells of one perturbation: its weight must not change
    keep = np.ones(len(data.perturbation), dtype=bool)
    keep[np.flatnonzero(data.perturbation == "G02")[2:7]] = False
    thin = only(data, keep)
    expected = np.mean([slow_effect(thin, name) for name in perturbations(thin)], axis=0)
    np.testing.assert_allclose(effect_of(fitted(MeanEffect(), thin), "G00+G07"), expected, atol=1e-12)


def test_additive_sums_single_effects_and_returns_seen_combinations_as_observed(data):
    method = fitted(Additive(), data)
    for name in ("G02+G05", "G01+G03+G07"):
        expected = sum(slow_effect(data, gene) for gene in name.split("+"))
        np.testing.assert_allclose(effect_of(method, name), expected, atol=1e-12)
    np.testing.assert_allclose(effect_of(method, "G00+G01"), slow_effect(data, "G00+G01"), atol=1e-12)


def test_additive_refuses_a_gene_seen_only_in_a_combination():
    data = plant(n_single=3, combos=("G00+G01",)).data
    keep = data.perturbation != "G01"
    only_in_combo = only(data, keep)
    method = fitted(Additive(), only_in_combo)
    with pytest.raises(UnseenPerturbationError, match="G01"):
        method.predict_one("G01+G02", "all")
    method.predict_one("G00+G01", "all")


def test_matching_mean_averages_and_fills_unseen_genes_with_the_mean_of_all(data):
    method = fitted(MatchingMean(), data)
    everything = np.mean([slow_effect(data, name) for name in perturbations(data)], axis=0)
    np.testing.assert_allclose(
        effect_of(method, "G02+G05"), (slow_effect(data, "G02") + slow_effect(data, "G05")) / 2, atol=1e-12
    )
    np.testing.assert_allclose(effect_of(method, "G02+NEW"), (slow_effect(data, "G02") + everything) / 2, atol=1e-12)
    np.testing.assert_allclose(effect_of(method, "NEW"), everything, atol=1e-12)
    np.testing.assert_allclose(effect_of(method, "G00+G01"), slow_effect(data, "G00+G01"), atol=1e-12)


def test_pca_ridge_solves_its_normal_equations_in_kronecker_form(data):
    k, penalty = 3, 0.1
    method = fitted(PcaRidge(PcaRidgeParams(n_components=k, ridge=penalty)), data)
    names = perturbations(data)
    effects = np.stack([slow_effect(data, name) for name in names])
    control = np.mean([slow_mean(data, "control", c) for c in CONTEXTS], axis=0)
    bulk = np.vstack([control, control + effects]).T  # genes x conditions
    centred = bulk - bulk.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    g = centred @ vectors[:, np.argsort(values)[::-1][:k]]
    index = {gene: i for i, gene in enumerate(data.genes)}
    p = np.stack([np.zeros(k)] + [sum(g[index[gene]] for gene in name.split("+")) for name in names])
    y = np.vstack([np.zeros(len(data.genes)), effects])
    b = y.mean(axis=0)
    # (G'G + l) W (P'P + l) = G' (Y - b)' P, written as one linear system in vec(W)
    left, right = g.T @ g + penalty * np.eye(k), p.T @ p + penalty * np.eye(k)
    w = np.linalg.solve(np.kron(left, right.T), (g.T @ (y - b).T @ p).ravel()).reshape(k, k)
    for name in ("G02", "G40", "G02+G05"):
        expected = g @ w @ sum(g[index[gene]] for gene in name.split("+")) + b
        np.testing.assert_allclose(effect_of(method, name), expected, atol=1e-9)


def test_pca_ridge_recovers_a_planted_bilinear_map():
    # Delta_p = G W p + b holds exactly when effects are linear in the genes' own embedding
    rng = np.random.default_rng(3)
    n_genes = 30
    g = rng.normal(size=(n_genes, 2))
    w = rng.normal(size=(2, 2))
    effects = {f"G{i:02d}": 0.3 * g @ w @ g[i] for i in range(12)}
    control = 3 + rng.normal(size=n_genes)
    rows = [control] + [control + effect for effect in effects.values()]
    names = ["control", *effects]
    data = TrainingData(
        sparse.csr_matrix(np.array(rows, dtype=np.float32)), np.array(names), np.array(["all"] * 13),
        np.zeros(13, dtype=bool), tuple(f"G{i:02d}" for i in range(n_genes)), np.zeros(n_genes),
        np.zeros((n_genes, 2)),
    )  # fmt: skip
    method = fitted(PcaRidge(PcaRidgeParams(n_components=3, ridge=1e-8)), data)
    for i in range(12):
        fit = method.predict_one(f"G{i:02d}", "all")["mean"] - control
        assert np.corrcoef(fit, effects[f"G{i:02d}"])[0, 1] > 0.99


def test_pca_ridge_refuses_genes_that_are_no_features(data):
    with pytest.raises(UnseenPerturbationError, match="ELSEWHERE"):
        fitted(PcaRidge(), data).predict_one("G00+ELSEWHERE", "a")


def test_a_context_without_training_controls_is_refused(data):
    with pytest.raises(MethodError, match="'c'"):
        fitted(Additive(), data).predict_one("G00", "c")
    keep = ~((data.perturbation == "control") & (data.context == "a"))
    headless = only(data, keep)
    with pytest.raises(MethodError, match="'a' has no control"):
        fitted(Additive(), headless)


def test_validation_cells_are_used(data):
    # a method that dropped them would not see half of these cells
    flipped = replace(data, is_val=np.arange(len(data.is_val)) % 2 == 0)
    np.testing.assert_array_equal(
        effect_of(fitted(Additive(), data), "G02"), effect_of(fitted(Additive(), flipped), "G02")
    )


# --- saving ---------------------------------------------------------------------------------------------------------

SPEC = MethodSpec(title="Additive", implementation="perturbed.models.baselines:Additive")


class OneTensor(Additive):
    """A method that keeps an array and a tensor."""

    def state(self):
        return {"effect": self._effects.effect, "control": torch.from_numpy(self._effects.control)}


def test_arrays_are_saved_without_dates_pickles_or_order(data, tmp_path):
    method = fitted(Additive(), data)
    save_model(tmp_path / "one", method, SPEC)
    file = tmp_path / "one" / "state.npz"
    state = method.state()
    method.state = lambda: {key: np.asfortranarray(state[key]) for key in reversed(state)}
    save_model(tmp_path / "two", method, SPEC)
    assert file.read_bytes() == (tmp_path / "two" / "state.npz").read_bytes()
    assert {member.date_time for member in zipfile.ZipFile(file).infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(file, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["effect"], state["effect"])
    method.state = lambda: {"effect": np.array([{"a": "pickle"}], dtype=object)}
    with pytest.raises(ValueError, match="allow_pickle"):
        save_model(tmp_path / "three", method, SPEC)
    assert not (tmp_path / "three").exists()


def test_a_mixture_is_saved_as_tensors(data, tmp_path):
    method = fitted(OneTensor(), data)
    save_model(tmp_path / "m", method, SPEC)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "state.pt"]
    loaded = load_model(tmp_path / "m")
    np.testing.assert_array_equal(effect_of(loaded, "G02+G05"), effect_of(method, "G02+G05"))


def test_a_broken_state_is_one_line(data, tmp_path):
    save_model(tmp_path / "m", fitted(Additive(), data), SPEC)
    whole = (tmp_path / "m" / "state.npz").read_bytes()
    (tmp_path / "m" / "state.npz").write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"not a readable model .* rerun `perturbed fit`"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "state.npz").unlink()
    with pytest.raises(DataError, match=r"state\.pt"):
        load_model(tmp_path / "m")
