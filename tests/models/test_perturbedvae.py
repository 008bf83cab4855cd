from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_cells import only, plant

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun
from perturbed.models.baselines import MeanEffect
from perturbed.models.cells import Batch
from perturbed.models.nn.likelihoods import Counts
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams
from perturbed.models.perturbedvae_module import Architecture, Draws, PerturbedVAEModule

SMALL = {"n_nu": 4, "n_iota": 3, "n_hidden": 8}
WEIGHTS = {"kl_weight_nu": 0.7, "kl_weight_iota": 0.3, "alpha": 0.5, "edge_penalty": 0.01}


def random_module(seed=0, n_genes=6, n_perturbed=5, **options) -> PerturbedVAEModule:
    torch.manual_seed(seed)
    module = PerturbedVAEModule(n_genes, n_perturbed, Architecture(**{**SMALL, **options})).double()
    with torch.no_grad():
        for parameter in module.scm.parameters():
            parameter.normal_(0, 0.3)
    return module


def random_batch(n=5, n_genes=6, n_perturbed=5, counts=False) -> tuple[Batch, Draws]:
    generator = torch.manual_seed(9)
    conditions = torch.zeros(3, n_perturbed, dtype=torch.double)
    conditions[1, 2], conditions[2, 0], conditions[2, 3], conditions[2, 4] = 1, 1, 1, 1
    condition = torch.tensor([0, 1, 2, 1, 2])[:n]
    x = torch.randn(2 * n, n_genes, dtype=torch.double, generator=generator)
    k = Counts(torch.tensor([0, 4, 11, 29]), torch.tensor([3.0, 1, 7, 2]).double(), torch.full((n,), 9.0).double())
    draws = Draws(*(torch.randn(n, d, dtype=torch.double, generator=generator) for d in (4, 3)))
    return Batch(x, conditions, condition, k if counts else None), draws


def params(**options) -> PerturbedVAEParams:
    quick = {"lr": 3e-3, "epochs": 3, "warm_up_epochs": 1, "n_samples": 20, "batch_size": 32}
    return PerturbedVAEParams(**{**SMALL, **quick, **options})


def fitted(data, seed=0, **options) -> PerturbedVAE:
    method = PerturbedVAE(params(**options))
    method.fit(data, FitRun(seed=seed, progress=False))
    return method


# --- the module ---------------------------------------------------------------------------------------------------


def test_loss_terms_match_their_formulas_cell_by_cell():
    module, (batch, draws) = random_module(), random_batch()
    terms = module.loss(batch, draws, **WEIGHTS)
    n = len(batch.condition)
    reconstruction = kl_nu = kl_iota = alignment = edges = 0.0
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    base = module.scm(torch.zeros(1, 5, dtype=torch.double))
    for i in range(n):
        u = batch.conditions[batch.condition[i]]
        m = module.scm(u[None])
        h, h0 = module.encoder(batch.x[i]), module.encoder(batch.x[n + i])
        (mu, var), (mu0, var0) = (module.encode_background(v[None]) for v in (h, h0))
        mean, raw = (module.nu_head(h) + module.nu_head_condition(u)).chunk(2)
        sd = (torch.nn.functional.softplus(raw) + 1e-6).sqrt()
        z_iota = mu[0] + var[0].sqrt() * draws.iota[i]
        right = mean + sd * draws.nu[i] + m.inputs[0] @ z_iota + m.shift[0]
        z_nu = torch.linalg.inv(torch.eye(4, dtype=torch.double) - m.edges[0]) @ right
        decoded = module.decoder(torch.cat([z_nu, z_iota]))
        reconstruction += (decoded - batch.x[i]).square().mean() / n
        kl_nu += kl(normal(mean, sd), normal(0 * mean, torch.exp(0.5 * m.log_variance[0]))).sum() / n
        for location, variance in ((mu, var), (mu0, var0)):
            kl_iota += kl(normal(location, variance.sqrt()), normal(0 * location, 1 + 0 * location)).sum() / n
        if u.any():
            alignment += (mu - mu0).square().sum() / 4  # four of the five cells are perturbed
        edges += ((m.edges - base.edges).abs().sum() + (m.inputs - base.inputs).abs().sum()) / n
    expected = (reconstruction, kl_nu, kl_iota, alignment, edges)
    for found, wanted in zip(terms[1:6], expected):
        torch.testing.assert_close(found, torch.as_tensor(wanted))
    total = reconstruction + 0.7 * kl_nu + 0.3 * kl_iota + 0.5 * alignment + 0.01 * edges
    torch.testing.assert_close(terms.loss, total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"condition_map": "mlp"},
        {"learn_noise": True, "reconstruction_reduction": "sum"},
        {"likelihood": "nb", "n_hidden_layers": 2},
        {"response_posterior": "autoregressive"},
    ],
)
def test_gradients_match_finite_differences(options):
    # a smooth activation: finite differences across the kink of a LeakyReLU would be wrong
    module = random_module(activation="tanh", **options)
    batch, draws = random_batch(counts=options.get("likelihood") == "nb")
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    values = tuple(module.get_parameter(name) for name in names)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self):
            return self.inner.loss(batch, draws, **WEIGHTS).loss

    wrapped = Loss()

    def loss(*tensors):
        return torch.func.functional_call(wrapped, {f"inner.{n}": t for n, t in zip(names, tensors)}, ())

    assert torch.autograd.gradcheck(loss, values)


def test_the_decoder_never_sees_the_condition():
    """With the latents held, another condition changes nothing; with the noise held, it changes the response."""
    module = random_module()
    conditions = torch.eye(5, dtype=torch.double)
    mechanisms = module.scm(conditions)
    z_iota, noise = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    here = module.generative(mechanisms, torch.arange(5), z_iota, noise)
    there = module.generative(mechanisms, torch.arange(5).roll(1), z_iota, noise)
    assert (here.z_nu - there.z_nu).abs().min() > 1e-6
    torch.testing.assert_close(module.decode(here.z_nu, z_iota), here.decoded)
    assert module.decoder[0].in_features == 4 + 3


def test_the_background_never_sees_the_condition():
    module, (batch, _) = random_module(), random_batch()
    here = module.inference(batch.x, batch.conditions, batch.condition)
    there = module.inference(batch.x, batch.conditions, batch.condition.flip(0))
    assert torch.equal(here.iota_mean, there.iota_mean)
    assert torch.equal(here.iota_variance, there.iota_variance)
    assert not torch.equal(here.noise_mean, there.noise_mean)


def test_partners_reach_only_the_background_terms():
    module, (batch, draws) = random_module(), random_batch()
    before = module.loss(batch, draws, **WEIGHTS)
    x = batch.x.clone()
    x[5:] += 1
    after = module.loss(batch._replace(x=x), draws, **WEIGHTS)
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert torch.equal(before.kl_nu, after.kl_nu)
    assert not torch.equal(before.kl_iota, after.kl_iota)
    assert not torch.equal(before.alignment, after.alignment)


def test_starting_at_the_mean_reconstructs_the_mean():
    module = random_module()
    with torch.no_grad():
        module.decoder[-1].weight.zero_()
    centre = torch.randn(6, dtype=torch.double)
    untouched = random_module()
    module.start_at(centre, centre)
    torch.testing.assert_close(module.decode(torch.randn(2, 4).double(), torch.randn(2, 3).double())[1], centre)
    x = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(module.encoder(x + centre), untouched.encoder(x))


def autoregressive_module(seed=0) -> PerturbedVAEModule:
    module = random_module(seed, response_posterior="autoregressive")
    with torch.no_grad():
        for head in module.regression_head:
            head.weight.normal_(0, 0.3)
    return module


def test_the_autoregressive_posterior_starts_as_the_diagonal_one_and_departs_from_it():
    batch, draws = random_batch()
    fresh = random_module(response_posterior="autoregressive")
    plain = random_module()
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if not k.startswith("regression_head")})
    for here, there in zip(fresh.loss(batch, draws, **WEIGHTS), plain.loss(batch, draws, **WEIGHTS)):
        torch.testing.assert_close(here, there)
    moved = autoregressive_module()
    moved.load_state_dict({**moved.state_dict(), **plain.state_dict()})
    here, there = moved.loss(batch, draws, **WEIGHTS), plain.loss(batch, draws, **WEIGHTS)
    assert here.kl_nu > there.kl_nu  # the prior's noise is independent; only the marginal variances differ
    assert here.reconstruction != there.reconstruction
    torch.testing.assert_close(here.kl_iota, there.kl_iota)


def test_the_kl_of_the_response_is_that_of_z_nu_against_the_scm_prior():
    """Against joint Gaussians of z_nu itself, given z_iota: posterior and prior pushed through the SCM."""
    module, (batch, _) = autoregressive_module(), random_batch()
    posterior = module.inference(batch.x, batch.conditions, batch.condition)
    m = module.scm(batch.conditions)
    eye = torch.eye(4, dtype=torch.double)
    found = posterior.kl_noise(m.log_variance[batch.condition])
    for i, row in enumerate(batch.condition):
        solve = torch.linalg.inv(eye - m.edges[row])
        inner = torch.linalg.inv(eye - posterior.noise_regression[i])
        offset = m.inputs[row] @ posterior.iota_mean[i] + m.shift[row]
        covariance = inner @ torch.diag(posterior.noise_variance[i]) @ inner.T
        q = torch.distributions.MultivariateNormal(
            solve @ (posterior.noise_mean[i] + offset), solve @ covariance @ solve.T
        )
        p = torch.distributions.MultivariateNormal(
            solve @ offset, solve @ torch.diag(m.log_variance[row].exp()) @ solve.T
        )
        torch.testing.assert_close(found[i], torch.distributions.kl_divergence(q, p))


def test_the_mmd_compares_generated_with_observed_cells_of_the_same_condition():
    module, (batch, draws) = random_module(), random_batch()
    generator = torch.manual_seed(3)
    extra = [torch.randn(5, d, dtype=torch.double, generator=generator) for d in (4, 3)]
    draws = Draws(draws.nu, draws.iota, *extra)
    off = module.loss(batch, draws, **WEIGHTS)
    on = module.loss(batch, draws, **WEIGHTS, mmd_weight=2.0, mmd_width=3.0)
    posterior = module.inference(batch.x, batch.conditions, batch.condition)
    m = module.scm(batch.conditions)
    generated = []
    for i, row in enumerate(batch.condition):
        z_iota = posterior.iota_mean[5 + i] + posterior.iota_variance[5 + i].sqrt() * extra[1][i]
        right = torch.exp(0.5 * m.log_variance[row]) * extra[0][i] + m.inputs[row] @ z_iota + m.shift[row]
        z_nu = torch.linalg.solve(torch.eye(4, dtype=torch.double) - m.edges[row], right)
        generated.append(module.decoder(torch.cat([z_nu, z_iota])))

    def kernel(a, b):
        return sum(torch.exp(-(a - b).square().sum() / (3.0 * 2.0 ** (k - 5))) for k in range(10))

    total = torch.zeros((), dtype=torch.double)
    for i in range(5):
        same = [j for j in range(5) if batch.condition[j] == batch.condition[i]]
        for j in same:
            pairs = kernel(generated[i], generated[j]) + kernel(batch.x[i], batch.x[j])
            total = total + (pairs - 2 * kernel(generated[i], batch.x[j])) / (len(same) * 5)
    torch.testing.assert_close(on.mmd, total)
    assert off.mmd == 0
    torch.testing.assert_close(on.loss, off.loss + 2 * total)


def test_active_units_are_counted():
    module, (batch, draws) = random_module(), random_batch()
    with torch.no_grad():
        module.iota_head.weight[1:3].zero_()  # means of the second and third background latent are constants
        module.iota_head.weight[0].mul_(50)
    assert module.loss(batch, draws, **WEIGHTS).active_iota == 1


# --- the method ---------------------------------------------------------------------------------------------------


def test_the_zero_condition_gives_the_control_model():
    """With no gene perturbed the prediction is the decoded SCM without any shift."""
    planted = plant()
    method = fitted(planted.data, n_samples=0, predict="mean")
    with torch.no_grad():
        z_iota = method._control["mean"]
        edges, inputs = method.module.scm.base.split(method.module.scm.sizes[:2])
        lower = torch.zeros(4, 4)
        lower[tuple(torch.tril_indices(4, 4, -1))] = edges
        z_nu = (torch.linalg.inv(torch.eye(4) - lower) @ inputs.view(4, 3) @ z_iota.T).T
        expected = method.module.decode(z_nu, z_iota).mean(0)
    np.testing.assert_allclose(method.predict_one("control", "all")["mean"], expected.numpy(), atol=1e-5)


def test_latents_are_those_of_the_module_and_only_the_response_sees_the_condition():
    data = plant().data
    method = fitted(data, n_samples=0)
    names = data.perturbation
    x = torch.from_numpy(data.X.toarray())
    conditions = torch.zeros(len(names), 8)
    for i, name in enumerate(names):
        if name != "control":
            conditions[i, data.seen_genes.index(name)] = 1
    with torch.no_grad():
        posterior = method.module.inference(x, conditions, torch.arange(len(x)))
        m = method.module.scm(conditions)
        z_nu = method.module.scm.respond(m, torch.arange(len(x)), posterior.iota_mean, posterior.noise_mean)
        h = method.module.encoder(x)
    np.testing.assert_allclose(method.represent(data.X), h.numpy(), atol=1e-5)
    np.testing.assert_allclose(method.encode_background(data.X), posterior.iota_mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(method.encode_response(data.X, names), z_nu.numpy(), atol=1e-5)
    with pytest.raises(UnseenPerturbationError, match="G20"):
        method.encode_response(data.X[:1], np.array(["G20"]))


def test_contexts_start_from_their_own_control_cells():
    data = plant(contexts=("a", "b"), n_cells=40).data  # context b lies 0.5 higher in every gene
    method = fitted(data, epochs=20, lr=1e-2, reconstruction_reduction="sum", kl_weight_nu=1.0, alpha=0.0, n_samples=0)
    higher = method.predict_one("G01", "b")["mean"] - method.predict_one("G01", "a")["mean"]
    assert higher.mean() > 0.2
    with pytest.raises(MethodError, match="'c'"):
        method.predict_one("G01", "c")


def test_samples_have_the_predicted_mean_and_variance():
    method = fitted(plant().data, n_samples=4000, predict="sample", learn_noise=True, epochs=10)
    found = method.predict_one("G00+G03", "all", seed=1)
    assert found["cells"].shape == (4000, 50)
    np.testing.assert_allclose(found["cells"].var(axis=0), found["variance"], rtol=0.15)
    error = np.abs(found["cells"].mean(axis=0) - found["mean"]) / np.sqrt(found["variance"] / 1000)
    assert error.max() < 5  # the mean is one of at least 1,000 samples


def test_predictions_are_functions_of_their_seed():
    method = fitted(plant().data, predict="sample")
    one, same, other = (method.predict_one("G00+G03", "all", seed=s) for s in (1, 1, 2))
    for key in ("mean", "variance", "cells"):
        np.testing.assert_array_equal(one[key], same[key])
        assert not np.array_equal(one[key], other[key])


def test_counts_are_predicted_on_the_scale_of_log_normalised_expression():
    planted = plant(counts=True, n_cells=60, n_control=150)
    method = fitted(
        planted.data, likelihood="nb", n_hidden=16, epochs=25, lr=1e-2, n_samples=300,
        reconstruction_reduction="sum", kl_weight_nu=3.0, kl_weight_iota=1.0,
    )  # fmt: skip
    found = method.predict_one("control", "all")
    everything = np.asarray(planted.data.X.mean(axis=0)).ravel()
    control = np.asarray(only(planted.data, planted.data.perturbation == "control").X.mean(axis=0)).ravel()
    assert np.abs(found["mean"] - control).mean() < 0.6 * np.abs(everything - control).mean()
    assert np.abs(found["cells"].mean(axis=0) - found["mean"]).mean() < 0.1
    assert (found["cells"] >= 0).all()
    normalised = np.expm1(found["cells"].astype(float)).sum(axis=1)
    assert abs(normalised.mean() - 1000) < 100


def test_counts_are_asked_for_before_any_work():
    with pytest.raises(MethodError, match="no counts"):
        PerturbedVAE(params(likelihood="nb")).check(plant().data)


def test_unseen_genes_are_refused_and_unperturbed_data_too():
    data = plant().data
    method = fitted(data)
    with pytest.raises(UnseenPerturbationError, match="G20"):
        method.predict_one("G00+G20", "all")
    with pytest.raises(MethodError, match="all cells are control"):
        fitted(only(data, data.perturbation == "control"))


def test_control_cells_without_a_single_count_do_not_break_the_count_likelihood():
    data = plant(counts=True).data
    empty = np.flatnonzero(data.perturbation == "control")[:2]
    counts, x = data.counts.tolil(), data.X.tolil()
    counts[empty], x[empty] = 0, 0
    method = fitted(replace(data, counts=counts.tocsr(), X=x.tocsr()), likelihood="nb")
    assert np.isfinite(method.predict_one("G00", "all")["mean"]).all()
    assert len(method._control["mean"]) == 80 - 2


def test_unseen_doubles_of_a_planted_scm_are_predicted_better_than_by_the_mean_effect():
    planted = plant(n_single=12, n_cells=60, n_control=150, n_genes=60, seed=1)
    method = fitted(
        planted.data,
        n_nu=6,
        n_iota=8,
        n_hidden=64,
        epochs=40,
        lr=3e-3,
        kl_weight_nu=0.3,
        kl_weight_iota=0.3,
        n_samples=0,
    )
    floor = MeanEffect()
    floor.fit(planted.data, FitRun())

    def pearson_delta(model) -> float:
        found = {name: model.predict_one(name, "all")["mean"] - planted.control for name in planted.doubles}
        return float(np.mean([np.corrcoef(found[n], planted.doubles[n] - planted.control)[0, 1] for n in found]))

    assert pearson_delta(method) > pearson_delta(floor) + 0.3
    assert pearson_delta(method) > 0.85
