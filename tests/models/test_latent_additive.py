from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_cells import only, plant
from scipy import sparse

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, load_model, save_model
from perturbed.models.baselines import Additive
from perturbed.models.latent_additive import PcaAdditive, PcaAdditiveParams
from perturbed.models.scvi_additive import ScviAdditive, ScviAdditiveParams, recover_counts
from perturbed.models.spec import MethodSpec

CONTEXTS = ("a", "b")
TARGETS = ("G02", "G00+G01", "G02+G05", "G01+G03+G07", "control")


def fitted(method, data, seed: int = 0, **run):
    method.fit(data, FitRun(seed=seed, **run))
    return method


# --- principal components -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    return plant(contexts=CONTEXTS, n_cells=15, n_control=25, combos=("G00+G01",)).data


def test_with_all_components_it_is_the_additive_baseline(cells):
    ours, additive = fitted(PcaAdditive(PcaAdditiveParams(n_pcs=50)), cells), fitted(Additive(), cells)
    assert ours._loadings.shape == (50, 50)
    for name in TARGETS:
        for context in CONTEXTS:
            expected = additive.predict_one(name, context)["mean"]
            np.testing.assert_allclose(ours.predict_one(name, context)["mean"], expected, atol=1e-9)


def test_few_components_are_a_projection_of_it(cells):
    train = cells.X.toarray().astype(float)[~cells.is_val]
    centre = train.mean(axis=0)
    loadings = np.linalg.svd(train - centre, full_matrices=False)[2][:4].T
    ours, additive = fitted(PcaAdditive(PcaAdditiveParams(n_pcs=4)), cells), fitted(Additive(), cells)
    for name in TARGETS:
        expected = centre + loadings @ loadings.T @ (additive.predict_one(name, "b")["mean"] - centre)
        np.testing.assert_allclose(ours.predict_one(name, "b")["mean"], expected, atol=1e-9)


def test_components_are_of_the_training_cells_only(cells):
    loud = cells.X.toarray()
    loud[cells.is_val] *= 10
    found = fitted(PcaAdditive(), replace(cells, X=sparse.csr_matrix(loud)))
    expected = fitted(PcaAdditive(), cells)
    np.testing.assert_array_equal(found._loadings, expected._loadings)
    np.testing.assert_array_equal(found._centre, expected._centre)


def test_generated_cells_are_shifted_control_cells(cells):
    method = fitted(PcaAdditive(PcaAdditiveParams(n_pcs=50, n_samples=400)), cells)
    control = cells.X.toarray()[(cells.perturbation == "control") & (cells.context == "a")]
    result = method.predict_one("G02+G05", "a", seed=1)
    moved = control - control.mean(axis=0) + result["mean"]
    nearest = np.abs(result["cells"][:, None] - moved[None]).max(axis=2).min(axis=1)
    assert nearest.max() < 1e-4
    np.testing.assert_allclose(result["variance"], control.var(axis=0), rtol=0.6, atol=0.05)
    assert not np.array_equal(result["cells"], method.predict_one("G02+G05", "a", seed=2)["cells"])


def test_representation_is_the_scores(cells):
    method = fitted(PcaAdditive(PcaAdditiveParams(n_pcs=3)), cells)
    scores = method.represent(cells.X)
    np.testing.assert_allclose(scores, (cells.X.toarray() - method._centre) @ method._loadings, atol=1e-5)
    assert abs(scores[~cells.is_val].mean()) < 1e-5


def test_unseen_genes_and_contexts_are_refused_and_kept_controls_are_capped(cells):
    method = fitted(PcaAdditive(PcaAdditiveParams(n_control=7)), cells)
    with pytest.raises(UnseenPerturbationError, match="PcaAdditive never saw G20"):
        method.predict_one("G00+G20", "a")
    with pytest.raises(MethodError, match="context 'c' was not in training; known: a, b"):
        method.predict_one("G00", "c")
    assert list(np.bincount(method._control_context)) == [7, 7]
    with pytest.raises(MethodError, match="'a' has no control"):
        fitted(PcaAdditive(), only(cells, ~((cells.perturbation == "control") & (cells.context == "a"))))


# --- scVI -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted():
    data = plant(n_cells=40, n_control=120, counts=True).data
    lanes = pd.DataFrame({"lane": np.where(np.arange(len(data.perturbation)) % 2, "x", "y")})
    return replace(data, covariates=lanes)


SMALL = {"n_latent": 6, "n_hidden": 32, "epochs": 60, "lr": 5e-3, "n_control": 60, "n_samples": 50, "patience": None}


@pytest.fixture(scope="module")
def scvi(counted):
    return fitted(ScviAdditive(ScviAdditiveParams(**SMALL, batch_key="lane")), counted)


def test_shifts_are_differences_of_mean_latents_and_add_up(scvi, counted):
    latents = scvi.represent(counted.X, counted.counts)
    mean = {name: latents[counted.perturbation == name].mean(axis=0) for name in ("control", "G01", "G02", "G05")}
    for name in ("G02+G05", "G01+G02+G05"):
        expected = sum(mean[gene] - mean["control"] for gene in name.split("+"))
        np.testing.assert_allclose(scvi.find_shift(name), expected, atol=1e-6)
    assert not scvi.find_shift("control").any()
    with pytest.raises(UnseenPerturbationError, match="G20"):
        scvi.predict_one("G00+G20", "all")


def test_decoding_against_scvi_tools_own_distribution(scvi):
    """The mean of log-normalised counts by drawing many, from a decoder called as scvi-tools calls it."""
    import torch

    rows = np.arange(60)
    z = torch.from_numpy(scvi._control + scvi.find_shift("G01+G03")).float()
    library = torch.from_numpy(np.log(scvi._cells["size"])).float()[:, None]
    with torch.no_grad():
        px = scvi._module.generative(z, library, torch.from_numpy(scvi._cells["batch"])[:, None])["px"]
        torch.manual_seed(0)
        counts = px.sample((2000,)).double().numpy()
    np.testing.assert_allclose(px.mean.sum(1), scvi._cells["size"], rtol=1e-4)
    drawn = np.log1p(scvi._cells["scale"][:, None] * counts)
    expected, error = drawn.mean(axis=(0, 1)), drawn.std(axis=0).mean(axis=0) / np.sqrt(2000 * 60)
    found = scvi.predict_one("G01+G03", "all", seed=4)
    assert np.abs((found["mean"] - expected) / error).max() < 5
    sampled = scvi._decode(z.double().numpy()[rows.repeat(40)], rows.repeat(40), np.random.default_rng(0))
    assert np.abs((sampled.mean(axis=0) - expected) / error).max() < 5 * np.sqrt(2000 / 40)
    assert found["cells"].shape == (50, 50) and (found["variance"] > 0).all()


def test_log_of_the_mean_is_larger_than_the_mean_of_the_log(scvi, tmp_path):
    spec = MethodSpec(title="scvi", implementation="perturbed.models.scvi_additive:ScviAdditive")
    save_model(tmp_path / "m", scvi, spec)
    other = load_model(tmp_path / "m")
    assert other.params == scvi.params
    other.params = scvi.params.model_copy(update={"expectation": "log1p_of_mean"})
    here, there = (method.predict_one("G01+G03", "all")["mean"] for method in (scvi, other))
    assert (there >= here).all() and (there > here + 1e-3).any()


def test_it_learns_what_perturbations_do(scvi, counted):
    """Known perturbations are predicted better than by no change, each."""
    dense = counted.X.toarray()
    base = scvi.predict_one("control", "all")["mean"]
    for name in ("G00", "G02", "G04"):
        truth = dense[counted.perturbation == name].mean(axis=0) - dense[counted.perturbation == "control"].mean(axis=0)
        found = scvi.predict_one(name, "all")["mean"] - base
        assert np.corrcoef(found, truth)[0, 1] > 0.6
        assert np.linalg.norm(found - truth) < 0.9 * np.linalg.norm(truth)


def test_cells_without_counts_are_left_out(counted):
    x, counts = counted.X.toarray(), counted.counts.toarray()
    x[:3], counts[:3] = 0, 0
    empty = replace(counted, X=sparse.csr_matrix(x), counts=sparse.csr_matrix(counts))
    tiny = {**SMALL, "epochs": 1}
    method = fitted(ScviAdditive(ScviAdditiveParams(**tiny)), empty)
    assert (method._cells["size"] > 0).all() and np.isfinite(method.predict_one("G01+G03", "all")["mean"]).all()


def test_what_is_missing_is_named(counted):
    with pytest.raises(MethodError, match=r"ScviAdditive .* hold no counts"):
        fitted(ScviAdditive(), replace(counted, counts=None))
    with pytest.raises(MethodError, match="batch_key 'plate' is no covariate of these cells; known: lane"):
        fitted(ScviAdditive(ScviAdditiveParams(batch_key="plate")), counted)


def test_global_generators_and_logging_are_left_alone(counted):
    import logging
    import random

    import torch

    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    level = logging.getLogger("lightning.pytorch").level
    fitted(ScviAdditive(ScviAdditiveParams(**{**SMALL, "epochs": 1})), counted)
    found = random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    assert found == (random.random(), np.random.random(), torch.rand(1).item())  # noqa: NPY002
    assert logging.getLogger("lightning.pytorch").level == level


def test_an_interrupt_stays_an_interrupt(counted, monkeypatch):
    import signal

    from scvi.train import TrainingPlan

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingPlan, "training_step", stop)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fitted(ScviAdditive(ScviAdditiveParams(**SMALL)), counted)
    assert signal.getsignal(signal.SIGINT) is before


def test_counts_are_recovered_from_log_normalised_values():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 6, size=(300, 40)))
    counts[0] = 0
    counts[1] = np.where(counts[1] > 0, counts[1] + 2, 0)  # no gene was counted once
    counts[2, :] = 0
    counts[2, :2] = [7, 9]
    total = counts.sum(axis=1, keepdims=True) + rng.integers(100, 5000, (300, 1))  # other genes were counted too
    X = sparse.csr_matrix(np.log1p(counts / total * 1e4).astype(np.float32))
    np.testing.assert_array_equal(recover_counts(X).toarray(), counts)
