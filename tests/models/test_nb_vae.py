"""The decoder arm's VAE: its terms, its heads with masked labels, and its predictions by gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score
from torch.distributions import NegativeBinomial, Normal, kl_divergence

from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.nb_vae import NBVAE, Head, NBVAEParams, encoder_input, warm_up_exponentially
from perturbed.models.nb_vae_module import Architecture, Batch, NBVAEModule
from perturbed.models.nn.likelihoods import gather_counts
from perturbed.training_options import TrainingOptions

GENES = tuple(f"G{i:02d}" for i in range(24))
QUICK = {
    "hidden": (24, 16),
    "lr": 5e-3,
    "batch_size": 64,
    "epochs": 40,
    "kl_weight": 1.0,
    "n_steps": 5,
    "n_control": 60,
}


def world(n=320, seed=0, perturbed=()) -> TrainingData:
    """Counts of cells along two programs: `state` raises G00..G05, `time` (0..100) lowers G06..G11."""
    rng = np.random.default_rng(seed)
    state, time = rng.random(n) < 0.5, rng.uniform(0, 100, n)
    log_rate = np.full((n, len(GENES)), 1.2) + rng.normal(0, 0.4, len(GENES))
    log_rate[:, :6] += 1.5 * state[:, None]
    log_rate[:, 6:12] -= 0.03 * time[:, None]
    counts = rng.poisson(np.exp(log_rate) * rng.gamma(8, 1 / 8, (n, 1))).astype(np.float32)
    counts[:, -1] += 1
    depth = counts.sum(axis=1)
    names = np.array(["control"] * n, dtype=object)
    for i, name in enumerate(perturbed):
        names[40 * i : 40 * (i + 1)] = name
    return TrainingData(
        X=sparse.csr_matrix(np.log1p(counts / depth[:, None] * 100).astype(np.float32)),
        perturbation=names,
        context=np.full(n, "all"),
        is_val=rng.random(n) < 0.15,
        genes=GENES,
        centre=np.zeros(len(GENES)),
        loadings=np.eye(len(GENES))[:, :2],
        counts=sparse.csr_matrix(counts),
        library=depth.astype(float),
        covariates=pd.DataFrame(
            {"state": np.where(state, "on", "off"), "time": time, "group": rng.choice(["a", "b", "c"], n)}
        ),
    )


def fitted(data, seed=0, **options) -> NBVAE:
    method = NBVAE(NBVAEParams(**{**QUICK, **options}))
    method.fit(data, FitRun(seed=seed, progress=False))
    return method


def same(one: NBVAE, two: NBVAE) -> bool:
    state, other = one.state(), two.state()
    return all(torch.equal(value, other[key]) for key, value in state.items())


# --- the terms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "gaussian"])
def test_loss_equals_the_sum_of_torchs_own_densities(likelihood):
    torch.manual_seed(0)
    module = NBVAEModule(7, ("binary", "continuous"), Architecture(hidden=(5, 4), n_latent=3, likelihood=likelihood))
    module = module.double()
    with torch.no_grad():
        module.log_dispersion.normal_(0, 0.5)
        module.head_centre[1], module.head_scale[1] = 50.0, 20.0
    counts = torch.poisson(torch.full((6, 7), 2.0), generator=torch.manual_seed(1)).double()
    size = counts.mean(dim=1)
    x = torch.log1p(counts / size[:, None])
    labels = torch.tensor([[1, 30], [0, np.nan], [np.nan, 70], [1, 10], [0, 90], [np.nan, np.nan]]).double()
    packed = gather_counts(sparse.csr_matrix(counts.numpy()), np.arange(6), size.numpy())
    packed = packed._replace(value=packed.value.double(), size=packed.size.double())
    noise = torch.randn(6, 3, dtype=torch.double)
    batch = Batch(x, labels, packed if likelihood == "nb" else None)
    found = module.loss(batch, noise, kl_weight=0.3, head_weights=torch.tensor([2.0, 5.0]).double())

    mean, variance = module.encode(x)
    posterior = Normal(mean, variance.sqrt())
    kl = kl_divergence(posterior, Normal(0, 1)).sum(dim=1).mean()
    activation, heads = module.activations(mean + variance.sqrt() * noise)
    if likelihood == "nb":
        m, theta = torch.nn.functional.softplus(activation) * size[:, None], module.log_dispersion.exp()
        density = NegativeBinomial(theta.expand_as(m), logits=m.log() - theta.log()).log_prob(counts)
    else:
        density = Normal(activation, module.log_dispersion.exp()).log_prob(x) + 0.5 * np.log(2 * np.pi)
    binary = -sum(
        torch.nn.functional.logsigmoid(heads[i, 0] * (1 if y else -1)) for i, y in [(0, 1), (1, 0), (3, 1), (4, 0)]
    )
    linear = sum(abs(heads[i, 1] - t) / 20 for i, t in [(0, 30), (2, 70), (3, 10), (4, 90)])
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(found.reconstruction, -density.sum(dim=1).mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.heads, (binary + linear) / 6)
    total = found.reconstruction + 0.3 * kl + (2 * binary + 5 * linear) / 6
    torch.testing.assert_close(found.loss, total)


def test_warm_up_rises_exponentially_to_one():
    values = [warm_up_exponentially(epoch, 10) for epoch in range(12)]
    assert values[0] == pytest.approx((np.exp(0.1) - 1) / (np.e - 1))
    assert values[4] == pytest.approx((np.exp(0.5) - 1) / (np.e - 1))
    assert values[9:] == [pytest.approx(1)] * 3 and values == sorted(values)
    assert warm_up_exponentially(0, 0) == 1


def test_encoder_input_is_the_same_from_counts_and_from_normalised_counts():
    data = world(50)
    counts = data.counts.toarray()
    expected = np.log1p(counts / counts.mean(axis=1, keepdims=True))
    found = encoder_input(data.X, "nb")
    np.testing.assert_allclose(found.toarray(), expected, rtol=2e-5)
    assert found.dtype == np.float32 and np.shares_memory(found.indices, data.X.indices)
    other_depth = sparse.csr_matrix(np.log1p(np.expm1(data.X.toarray()) * 37).astype(np.float32))
    np.testing.assert_allclose(encoder_input(other_depth, "nb").toarray(), expected, rtol=2e-5)
    assert encoder_input(data.X, "gaussian") is data.X
    empty = sparse.csr_matrix((2, 4), dtype=np.float32)
    assert encoder_input(empty, "nb").nnz == 0


def test_patience_waits_for_the_least_epochs_and_the_best_weights_are_kept():
    data, rows = world(120), []
    options = {"epochs": 60, "patience": 1, "min_epochs": 12, "lr": 0.05, "hidden": (8,)}
    method = NBVAE(NBVAEParams(**{**QUICK, **options}))
    method.fit(data, FitRun(progress=False, history=lambda row: rows.append(dict(row))))
    losses = [row["val_loss"] for row in rows]
    assert 12 <= len(losses) < 60 and len(losses) - 1 - int(np.argmin(losses)) >= 1
    short: list = []
    NBVAE(NBVAEParams(**{**QUICK, **options, "epochs": int(np.argmin(losses)) + 1})).fit(
        data, FitRun(progress=False, history=lambda row: short.append(row))
    )
    assert short[-1]["val_loss"] == min(losses)
    assert TrainingOptions().min_epochs == 0


# --- heads --------------------------------------------------------------------------------------------------------

HEADS = {
    "on": Head(column="state", positive=("on",), weight=20.0),
    "time": Head(column="time", kind="continuous", weight=20.0),
}


def decoded_heads(method: NBVAE, X) -> np.ndarray:
    with torch.no_grad():
        return method.module.activations(torch.from_numpy(method.represent(X)))[1].numpy()


def test_heads_learn_planted_labels_from_a_part_of_them():
    data = world(600)
    few = {name: head.model_copy(update={"labelled_fraction": 0.3}) for name, head in HEADS.items()}
    found = decoded_heads(fitted(data, heads=few, epochs=60), data.X)
    time = data.covariates["time"].to_numpy()
    assert roc_auc_score(data.covariates["state"] == "on", found[:, 0]) > 0.95
    assert np.corrcoef(found[:, 1], time)[0, 1] > 0.8
    assert np.abs(found[:, 1] - time).mean() < 15  # in the label's own unit, 25 by chance


def test_a_head_predicts_labels_it_did_not_see_only_where_there_is_something_to_learn():
    data, masked = world(600), {"on": HEADS["on"].model_copy(update={"mask": {"group": ("a",)}})}
    unseen = (data.covariates["group"] == "a").to_numpy()
    for name, low, high in (("state", 0.95, 1.0), ("noise", 0.35, 0.65)):
        noise = data.covariates["state"].sample(frac=1, random_state=0).to_numpy()
        label = data.covariates["state"].to_numpy() if name == "state" else noise
        method = fitted(replace(data, covariates=data.covariates.assign(state=label)), heads=masked, epochs=15)
        found = decoded_heads(method, data.X)[unseen, 0]
        assert low < roc_auc_score(label[unseen] == "on", found) <= high


@pytest.mark.parametrize("key", ["mask", "unknown"])
def test_masked_labels_are_not_used_at_all(key):
    data = world(160)
    if key == "mask":
        heads = {"on": HEADS["on"].model_copy(update={"mask": {"group": ("a",)}})}
        hidden = (data.covariates["group"] == "a").to_numpy()
        changed = data.covariates.assign(state=np.where(hidden, "off", data.covariates["state"]))
    else:
        heads = {"on": HEADS["on"].model_copy(update={"unknown": ("?", "!")})}
        hidden = np.arange(160) % 3 == 0
        data = replace(data, covariates=data.covariates.assign(state=np.where(hidden, "?", data.covariates["state"])))
        changed = data.covariates.assign(state=np.where(hidden, "!", data.covariates["state"]))
    assert (changed["state"] != data.covariates["state"]).any()
    options = {"heads": heads, "epochs": 3}
    one = fitted(data, **options)
    assert same(one, fitted(replace(data, covariates=changed), **options))
    seen = np.where(hidden, data.covariates["state"], np.where(data.covariates["state"] == "on", "off", "on"))
    assert not same(one, fitted(replace(data, covariates=data.covariates.assign(state=seen)), **options))


def test_a_share_of_labels_is_a_share_and_another_seed_draws_others():
    data = world(400)
    method = NBVAE(NBVAEParams(heads={"on": HEADS["on"].model_copy(update={"labelled_fraction": 0.25})}))
    known = [np.isfinite(method._labels(data, seed)[:, 0]) for seed in (0, 0, 1)]
    assert 0.18 < known[0].mean() < 0.32 and (known[0] == known[1]).all() and (known[0] != known[2]).any()


def test_wrong_heads_are_named():
    data = world(80)
    with pytest.raises(DataError, match=r"head 'on': no column 'sate'.*did you mean 'state'"):
        fitted(data, heads={"on": Head(column="sate", positive=("on",))})
    with pytest.raises(DataError, match="no training cell has a known label"):
        fitted(data, heads={"on": Head(column="state", positive=("on",), unknown=("on", "off"))})
    with pytest.raises(DataError, match="head 'G01': a gene has this name"):
        fitted(data, heads={"G01": HEADS["on"]})
    with pytest.raises(DataError, match="no numbers"):
        fitted(data, heads={"t": Head(column="state", kind="continuous")})


def test_a_checkpoint_of_other_labels_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("perturbed.training.CHECKPOINT_SECONDS", 0.0)
    data = world(120)
    flipped = replace(
        data, covariates=data.covariates.assign(state=np.where(data.covariates["state"] == "on", "off", "on"))
    )
    method = NBVAE(NBVAEParams(**{**QUICK, "heads": HEADS, "epochs": 3}))
    method.fit(data, FitRun(progress=False, checkpoint=tmp_path / "c.pt"))
    again = NBVAE(method.params)
    again.fit(flipped, FitRun(progress=False, checkpoint=tmp_path / "c.pt"))
    assert same(again, fitted(flipped, heads=HEADS, epochs=3))


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> NBVAE:
    return fitted(world(400), n_latent=4)


@pytest.mark.parametrize("likelihood", ["nb", "gaussian"])
def test_over_expression_raises_the_gene_and_its_program_and_knock_down_lowers_them(likelihood):
    data = world(400)
    up = fitted(data, n_latent=4, likelihood=likelihood)
    down = fitted(data, n_latent=4, likelihood=likelihood, direction="knock_down")
    control = np.asarray(data.X.mean(axis=0)).ravel()
    effect = up.predict_one("G00", "all")["mean"] - control
    rest = np.median(effect[12:])  # G12.. follow nothing; all fall alike, since depth is fixed
    assert effect[:6].min() > 0 and (effect[:6] - rest).min() > 3 * np.abs(effect[12:] - rest).max()
    lower = down.predict_one("G00", "all")["mean"] - control
    assert lower[:6].max() < 0 and lower[:6].max() < lower[12:].min()
    np.testing.assert_allclose(up.predict_one("control", "all")["mean"], control, rtol=1e-5)


def test_the_perturbed_gene_can_be_left_out(trained):
    out = fitted(world(400), n_latent=4, own_gene="left_out")
    control = np.asarray(world(400).X.mean(axis=0)).ravel()
    with_own, without = (m.predict_one("G00+G07", "all")["mean"] - control for m in (trained, out))
    np.testing.assert_allclose(without[[0, 7]], 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(without, [0, 7]), np.delete(with_own, [0, 7]), atol=1e-6)
    assert abs(with_own[0]) > 0.01


def test_one_factor_calibrates_all_perturbations_by_least_squares():
    data = world(320, perturbed=("G00", "G07", "unheard"))
    method = fitted(data)
    raw = NBVAE(method.params)
    raw.load_state(method.state() | {"control.calibration": torch.ones((), dtype=torch.float64)}, method.meta())
    control = method._control["mean"][0].numpy()
    seen = np.concatenate(
        [np.asarray(data.X[data.perturbation == name].mean(axis=0)).ravel() - control for name in ("G00", "G07")]
    )
    change = np.concatenate([raw.predict_one(name, "all")["mean"] - control for name in ("G00", "G07")])
    expected = max(seen @ change / (change @ change), 0)
    assert float(method._control["calibration"]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert float(fitted(world(120), epochs=2)._control["calibration"]) == 1


def test_what_the_decoder_lacks_is_refused_by_name(trained):
    with pytest.raises(UnseenPerturbationError, match="no output for MYC"):
        trained.predict_one("G00+MYC", "all")
    with pytest.raises(MethodError, match="context 'liver' was not in training"):
        trained.predict_one("G00", "liver")
    with pytest.raises(MethodError, match="count likelihood"):
        NBVAE(NBVAEParams()).check(replace(world(20), counts=None))
    NBVAE(NBVAEParams(likelihood="gaussian")).check(replace(world(20), counts=None))


def test_the_latent_space_orders_cells_by_what_moves_them(trained):
    data = world(400)
    z = trained.represent(data.X)
    on = (data.covariates["state"] == "on").to_numpy()
    direction = z[on].mean(axis=0) - z[~on].mean(axis=0)
    assert roc_auc_score(on, z @ direction) > 0.95
    mean, sd = trained.encode(data.X)
    np.testing.assert_array_equal(mean, z)
    assert (sd > 0).all() and sd.shape == z.shape
