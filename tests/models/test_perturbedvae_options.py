"""What each option of PerturbedVAE changes, and what the alignment does to the background."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_cells import only, plant
from scipy import sparse

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams
from perturbed.training import dense_rows


def trained(data: TrainingData, seed: int = 0, **options) -> tuple[PerturbedVAE, list[dict]]:
    """A quick fit and its history."""
    quick = {"n_nu": 4, "n_iota": 3, "n_hidden": 8, "lr": 3e-3, "epochs": 3, "warm_up_epochs": 1, "batch_size": 32}
    method = PerturbedVAE(PerturbedVAEParams(**{**quick, "n_samples": 0, **options}))
    rows: list[dict] = []
    method.fit(data, FitRun(seed=seed, progress=False, history=lambda row: rows.append(dict(row))))
    return method, rows


def effect(method: PerturbedVAE, perturbation: str) -> np.ndarray:
    """Predicted change from control, the same draws behind both."""
    return method.predict_mean(perturbation, "all") - method.predict_mean("control", "all")


# --- alignment ----------------------------------------------------------------------------------------------------


def plant_state(n_cells: int = 80, seed: int = 0) -> tuple[TrainingData, np.ndarray]:
    """Six perturbations that move cells in one plane, and a cell state of its own direction that none of them moves."""
    rng = np.random.default_rng([seed, 3])
    angle = np.arange(6) * np.pi / 3
    corner = {f"G{i:02d}": 2 * np.array([np.cos(a), np.sin(a)]) for i, a in enumerate(angle)} | {"control": np.zeros(2)}
    names = np.array([name for name in corner for _ in range(n_cells * (3 if name == "control" else 1))])
    state = rng.random(len(names)) < 0.5
    response = np.array([corner[name] for name in names]) + 0.5 * rng.normal(size=(len(names), 2))
    z = np.column_stack([response, np.where(state, 1.5, -1.5)])
    mix = 3 * np.linalg.qr(rng.normal(size=(40, 3)))[0].T
    x = np.maximum(5 + z @ mix + 0.3 * rng.normal(size=(len(names), 40)), 0).astype(np.float32)
    centre = x.mean(0, dtype=np.float64)
    data = TrainingData(
        X=sparse.csr_matrix(x),
        perturbation=names,
        context=np.full(len(names), "all"),
        is_val=np.zeros(len(names), dtype=bool),
        genes=tuple(f"G{i:02d}" for i in range(40)),
        centre=centre,
        loadings=np.linalg.svd(x - centre, full_matrices=False)[2][:5].T,
    )
    return data, state


def read_labels(z: np.ndarray, labels: np.ndarray) -> float:
    """Share of labels that a ridge regression on half of the cells reads from the latents of the other half."""
    names, place = np.unique(labels, return_inverse=True)
    design = np.column_stack([np.ones(len(z)), (z - z.mean(0)) / z.std(0)])
    fit, test = design[::2], design[1::2]
    weights = np.linalg.solve(fit.T @ fit + 0.1 * np.eye(fit.shape[1]), fit.T @ np.eye(len(names))[place[::2]])
    return float(((test @ weights).argmax(1) == place[1::2]).mean())


def test_alignment_takes_the_condition_out_of_the_background_and_leaves_the_state_in():
    """With partners that share their background, as the theory asks; a collapsed z_ι would align, and say nothing."""
    data, state = plant_state(seed=1)
    perturbed = data.perturbation != "control"
    condition, kept, spread = {}, {}, {}
    for alpha in (0.0, 0.5):
        options = {"n_nu": 2, "n_iota": 2, "n_hidden": 32, "epochs": 15, "lr": 5e-3, "partners": "matched_pca"}
        z = trained(data, seed=1, alpha=alpha, **options)[0].encode_background(data.X)
        condition[alpha] = read_labels(z[perturbed], data.perturbation[perturbed])
        kept[alpha] = read_labels(z, state)
        spread[alpha] = z.std(0).max()
    assert condition[0.5] < 0.4 < 0.6 < condition[0.0]  # chance is 1/6
    assert kept[0.5] > 0.95 > kept[0.0]
    assert spread[0.5] > 0.5


# --- options ------------------------------------------------------------------------------------------------------


def test_an_mlp_of_the_condition_learns_combinations_and_predicts_unseen_ones():
    planted = plant(n_single=6, combos=("G00+G01", "G00+G03", "G01+G02", "G02+G05", "G03+G04", "G04+G05"))
    longer = {"epochs": 12, "lr": 5e-3, "n_nu": 5, "n_hidden": 32, "kl_weight_nu": 0.3, "kl_weight_iota": 0.3}
    method, _ = trained(planted.data, condition_map="mlp", **longer)
    pair, first, second = (method.module.scm(method._condition(g)).shift for g in (("G00", "G04"), ("G00",), ("G04",)))
    assert (pair - first - second).abs().max() > 1e-3  # a linear map would add
    found = [np.corrcoef(effect(method, name), mean - planted.control)[0, 1] for name, mean in planted.doubles.items()]
    assert np.mean(found) > 0.9
    with pytest.raises(UnseenPerturbationError, match="G20"):
        method.predict_mean("G00+G20", "all")


@pytest.mark.parametrize("posterior", ["diagonal", "autoregressive"])
def test_each_noise_depends_on_those_before_it_in_the_autoregressive_posterior_only(posterior):
    data = plant().data
    module = trained(data, response_posterior=posterior)[0].module
    condition = torch.zeros(1, 8)
    condition[0, 2] = 1
    with torch.no_grad():
        given = module.inference(dense_rows(data.X, np.array([100])), condition, torch.zeros(1, dtype=torch.long))
    slope = torch.autograd.functional.jacobian(lambda draws: given.sample_noise(draws)[0], torch.zeros(1, 4))[:, 0]
    assert (slope.diagonal() > 0).all() and not slope.triu(1).any()
    assert bool(slope.tril(-1).any()) is (posterior == "autoregressive")


def test_the_mmd_brings_generated_cells_nearer():
    data = plant().data
    off, on = (trained(data, mmd_weight=w, mmd_width=20.0)[1][-1]["mmd"] for w in (1e-9, 1.0))
    assert on < 0.6 * off


def test_matched_partners_are_what_the_fit_aligns_with():
    data, _ = plant_state(n_cells=40)
    random, matched = (trained(data, alpha=0.0, partners=p)[1][-1]["alignment"] for p in ("random", "matched_pca"))
    assert matched < 0.8 * random


def test_the_delay_leaves_the_reconstruction_alone_until_it_is_over():
    _, rows = trained(plant().data, warm_up_delay=2, edge_penalty=0.0)
    assert [row["loss"] == row["reconstruction"] for row in rows] == [True, True, False]


def test_half_precision_rounds_and_changes_nothing_else():
    data = plant().data
    full, half = (effect(trained(data, precision=p)[0], "G00+G01+G02") for p in ("float32", "bfloat16"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, atol=0.02 * np.abs(full).max())


def test_the_mmd_is_refused_for_counts():
    with pytest.raises(MethodError, match="mmd_weight"):
        PerturbedVAE(PerturbedVAEParams(likelihood="nb", mmd_weight=1.0))


def test_anchor_moves_the_control_prediction_onto_the_control_mean():
    planted = plant()
    control = only(planted.data, planted.data.perturbation == "control").X.mean(axis=0)
    off, on = (trained(planted.data, anchor=anchor)[0] for anchor in (False, True))
    np.testing.assert_allclose(on.predict_one("control", "all")["mean"], np.asarray(control).ravel(), atol=1e-5)
    shift = on.predict_one("control", "all")["mean"] - off.predict_one("control", "all")["mean"]
    both = on.predict_one("G01+G02", "all")["mean"] - off.predict_one("G01+G02", "all")["mean"]
    np.testing.assert_allclose(both, shift, atol=1e-5)
