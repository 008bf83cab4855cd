from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_cells import plant
from sparse_world import control_error, effect_match, plant_sparse_shifts
from torch.distributions import Beta, Normal, kl_divergence

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun
from perturbed.models.sparse_shift_module import GAIN, ShiftBatch, SVAEPlusArchitecture, SVAEPlusModule
from perturbed.models.svae_plus import SVAEPlus, SVAEPlusParams
from perturbed.training import Random

QUICK = {"n_latent": 8, "n_hidden": 32, "lr": 3e-3, "batch_size": 64, "epochs": 60, "warm_up_epochs": 10}


def fitted(data, seed=0, **options) -> SVAEPlus:
    method = SVAEPlus(SVAEPlusParams(**{**QUICK, **options}))
    method.fit(data, FitRun(seed=seed, progress=False))
    return method


def random_module(n_perturbed=3, n_latent=4, **options) -> SVAEPlusModule:
    torch.manual_seed(0)
    architecture = SVAEPlusArchitecture(n_latent=n_latent, n_hidden=5, likelihood="gaussian", **options)
    module = SVAEPlusModule(6, n_perturbed, architecture).double()
    with torch.no_grad():
        for parameter in (module._shift, module._logit):
            parameter.normal_(0, 1 / GAIN)
    return module


CONDITIONS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]).double()


# --- the terms ----------------------------------------------------------------------------------------------------


def test_the_latent_divergence_is_the_expectation_over_masks():
    module = random_module()
    mean, variance = torch.randn(5, 4, dtype=torch.double), torch.rand(5, 4, dtype=torch.double) + 0.1
    condition = torch.tensor([0, 1, 2, 3, 3])
    with torch.no_grad():
        found = module.kl_latent(mean, variance, CONDITIONS, condition)
        torch.manual_seed(4)
        n = 20_000
        masks = torch.bernoulli(torch.sigmoid(module.logit).expand(n, -1, -1))
        prior = torch.einsum("cg,ngl->ncl", CONDITIONS, masks * module.shift)[:, condition]
        drawn = kl_divergence(Normal(mean, variance.sqrt()), Normal(prior, 1.0)).sum(-1)
    standard_error = drawn.std(0) / n**0.5
    assert (found - drawn.mean(0)).abs().max() < 5 * standard_error.max()
    torch.testing.assert_close(found[0], drawn[0, 0])  # control: N(0, I), no mask has a say


def test_the_global_penalty_is_the_beta_prior_of_the_masks_probability():
    module = random_module(mask_beta=3.0)
    with torch.no_grad():
        log_prior = Beta(1.0, 3.0).log_prob(torch.sigmoid(module.logit)) - np.log(3.0)
        torch.testing.assert_close(module.global_penalty(), -log_prior.sum())
    assert random_module(mask_beta=1.0).global_penalty() == 0


def test_the_loss_is_the_sum_of_its_terms_and_its_gradient_is_right():
    module = random_module(activation="silu")
    x = torch.randn(4, 6, dtype=torch.double, generator=torch.manual_seed(3))
    nothing = torch.empty(0, dtype=torch.long)
    batch = ShiftBatch(x, CONDITIONS, torch.tensor([0, 1, 2, 3]), nothing, nothing)
    terms = module.loss(batch, Random.seeded(0, 1), weight=0.5, n_cells=10)
    torch.testing.assert_close(terms.kl_global, module.global_penalty() / 10)
    torch.testing.assert_close(terms.loss, terms.reconstruction + 0.5 * (terms.kl_latent + terms.kl_global))
    terms.loss.backward()
    for parameter in (module._shift, module._logit, module.head.weight, module.log_dispersion):
        index, step = np.unravel_index(1, parameter.shape), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                values.append(module.loss(batch, Random.seeded(0, 1), weight=0.5, n_cells=10).loss)
                parameter[index] -= sign * step
        torch.testing.assert_close(parameter.grad[index], (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-7)


# --- the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_sparse_shifts_are_recovered(likelihood):
    world = plant_sparse_shifts(counts=likelihood == "nb")
    method = fitted(world.data, likelihood=likelihood, start_from="control")
    correlation, slope = effect_match(method, world)
    assert correlation > 0.9
    assert 0.6 < slope < 1.25
    assert control_error(method, world) < 0.1
    size = np.linalg.norm(method.effects()["shift"], axis=1)
    assert size[world.inert].max() < 0.4 * size[~world.inert].min()


def test_without_effects_the_shifts_vanish():
    world = plant_sparse_shifts(null=True)
    acting = plant_sparse_shifts()
    size = [np.linalg.norm(fitted(w.data, likelihood="gaussian").effects()["shift"], axis=1) for w in (world, acting)]
    assert size[0].max() < 0.4 * size[1][~acting.inert].min()


def test_predictions_start_from_the_prior_unless_asked():
    data = plant().data
    prior = fitted(data, likelihood="gaussian", epochs=2, n_samples=7)
    generator = np.random.default_rng(0)
    prior._control["mean"] += torch.from_numpy(generator.normal(size=prior._control["mean"].shape)).float()
    control = fitted(data, likelihood="gaussian", epochs=2, n_samples=7, start_from="control")
    before = [method.predict_one("G00", "all") for method in (fitted(data, likelihood="gaussian", epochs=2), control)]
    assert before[1]["cells"].shape == (7, data.X.shape[1])
    np.testing.assert_array_equal(prior.predict_one("G00", "all")["mean"], before[0]["mean"])
    control._control["mean"] += 1
    assert np.abs(control.predict_one("G00", "all")["mean"] - before[1]["mean"]).max() > 1e-3


def test_a_combination_adds_the_prior_shifts_of_its_genes():
    method = fitted(plant().data, likelihood="gaussian", epochs=3, predict="mean")
    shift = method.effects()["shift"][[method._perturbed.index(name) for name in ("G01", "G04", "G06")]].sum(0)
    with torch.no_grad():
        expected = method.module.decode(torch.from_numpy(shift)[None])[0].numpy()
    np.testing.assert_allclose(method.predict_one("G01+G04+G06", "all")["mean"], expected, rtol=1e-4, atol=1e-5)


def test_data_it_cannot_use_are_refused():
    with pytest.raises(MethodError, match="count likelihood"):
        SVAEPlus().check(plant().data)
    method = fitted(plant().data, likelihood="gaussian", epochs=1)
    with pytest.raises(UnseenPerturbationError, match=r"sVAE\+ never saw G44"):
        method.predict_one("G00+G44", "all")
