from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_cells import plant
from sparse_world import control_error, effect_match, plant_sparse_shifts
from torch.distributions import Bernoulli, Normal, kl_divergence

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun
from perturbed.models.nn.likelihoods import Counts
from perturbed.models.sams_vae import SAMSVAE, SAMSVAEParams
from perturbed.models.sparse_shift_module import (
    GAIN,
    SAMSArchitecture,
    SAMSModule,
    ShiftBatch,
    draw_masks,
    kl_bernoulli,
    kl_normal,
)
from perturbed.training import Random

QUICK = {
    "n_latent": 8,
    "n_hidden": 32,
    "lr": 3e-3,
    "batch_size": 64,
    "epochs": 60,
    "warm_up_epochs": 10,
    "n_samples": 5,
}


def fitted(data, seed=0, **options) -> SAMSVAE:
    method = SAMSVAE(SAMSVAEParams(**{**QUICK, **options}))
    method.fit(data, FitRun(seed=seed, progress=False))
    return method


def random_module(n_genes=6, n_perturbed=3, n_latent=4, **options) -> SAMSModule:
    torch.manual_seed(0)
    architecture = SAMSArchitecture(n_latent=n_latent, n_hidden=5, likelihood="gaussian", **options)
    module = SAMSModule(n_genes, n_perturbed, architecture).double()
    with torch.no_grad():
        for parameter in (module._shift, module._logit):
            parameter.normal_(0, 1 / GAIN)
        module._raw_sd.normal_(0, 1)
        module.log_dispersion.normal_(0, 0.2)
    return module


def a_batch(n=4, n_genes=6, likelihood="gaussian") -> ShiftBatch:
    """Control, two singles and a double."""
    x = torch.randn(n, n_genes, dtype=torch.double, generator=torch.manual_seed(3))
    conditions = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0]]).double()
    pair_cell, pair_gene = torch.tensor([1, 2, 3, 3]), torch.tensor([0, 2, 0, 1])
    counts = Counts(torch.tensor([0, 8, 23]), torch.tensor([2.0, 5, 1]).double(), torch.full((n,), 7.0).double())
    return ShiftBatch(x, conditions, torch.arange(n), pair_cell, pair_gene, counts if likelihood == "nb" else None)


# --- the terms ----------------------------------------------------------------------------------------------------


def test_divergences_equal_those_of_torch():
    logit = torch.linspace(-6, 6, 13, dtype=torch.double)
    expected = kl_divergence(Bernoulli(logits=logit), Bernoulli(torch.tensor(0.01, dtype=torch.double)))
    torch.testing.assert_close(kl_bernoulli(logit, 0.01), expected)
    mean, sd = torch.randn(9, dtype=torch.double), torch.rand(9, dtype=torch.double) + 0.1
    expected = kl_divergence(Normal(mean, sd), Normal(torch.zeros(9).double(), 1.7))
    torch.testing.assert_close(kl_normal(mean, sd, 1.7), expected)


@pytest.mark.parametrize("value", [-90.0, 90.0])
def test_the_masks_divergence_keeps_a_finite_gradient_at_certainty(value):
    logit = torch.tensor(value, requires_grad=True)
    kl_bernoulli(logit, 0.01).backward()
    assert torch.isfinite(logit.grad)


def test_the_correlated_divergence_is_that_of_mask_and_shift_together():
    module = random_module()
    with torch.no_grad():
        probability, mean, sd = torch.sigmoid(module.logit), module.shift, module.shift_sd
        torch.manual_seed(5)
        total = torch.zeros((), dtype=torch.double)
        n = 40_000
        for _ in range(4):
            mask = torch.bernoulli(probability.expand(n // 4, -1, -1))
            # a shift that is masked off is drawn from its prior
            posterior = Normal(mask * mean, mask * sd + (1 - mask))
            shift = posterior.sample()
            q = Bernoulli(probability).log_prob(mask) + posterior.log_prob(shift)
            p = Bernoulli(torch.tensor(0.01).double()).log_prob(mask) + Normal(0.0, 1.0).log_prob(shift)
            total += (q - p).sum() / n
        torch.testing.assert_close(module.kl_global(), total, rtol=0.01, atol=0)
        free = random_module(posterior="mean_field")
        unweighted = kl_normal(free.shift, free.shift_sd, 1.0) + kl_bernoulli(free.logit, 0.01)
        torch.testing.assert_close(free.kl_global(), unweighted.sum())


def test_masks_are_bernoulli_and_carry_the_gradient_of_their_sigmoid():
    logit = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    random = Random.seeded(0, 1)
    masks = draw_masks(logit.expand(20_000, 3), random)
    assert set(masks.detach().unique().tolist()) <= {0.0, 1.0}
    np.testing.assert_allclose(masks.detach().mean(0), torch.sigmoid(logit).detach(), atol=0.015)
    masks.mean(0).sum().backward()
    assert (logit.grad > 0.03).all()


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_the_loss_is_the_negative_elbo_per_cell(likelihood):
    module, batch = random_module(), a_batch(likelihood=likelihood)
    module.architecture = module.options = module.options.model_copy(update={"likelihood": likelihood})
    with torch.no_grad():
        module._logit.fill_(60.0 / GAIN)  # masks on for certain, shifts known: only z is random
        module._raw_sd.fill_(-30.0)
        terms = [module.loss(batch, Random.seeded(s, 1), weight=1.0, n_cells=50) for s in range(1500)]
        total = torch.stack([term.loss for term in terms]).mean()
        shift = batch.conditions @ module.shift
        expected = torch.zeros((), dtype=torch.double)
        torch.manual_seed(1)
        for i in range(len(batch.x)):
            h = module.encoder(torch.cat([batch.x[i], shift[i]]))
            mean, raw = module.head(h).chunk(2)
            q = Normal(mean, (torch.nn.functional.softplus(raw) + 1e-6).sqrt())
            z = q.sample((1500,))
            out = module.decoder(z + shift[i])
            if likelihood == "gaussian":
                noise = module.log_noise.exp()
                # the loss leaves out the Gaussian's constant
                score = (Normal(out, noise).log_prob(batch.x[i]) + 0.5 * np.log(2 * np.pi)).sum(1)
            else:
                counts = torch.zeros(24).double().index_put((batch.counts.position,), batch.counts.value).view(4, 6)[i]
                mu, theta = 7.0 * out.softmax(1), module.log_noise.exp()
                score = torch.distributions.NegativeBinomial(theta, probs=mu / (mu + theta)).log_prob(counts).sum(1)
            kl = kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum()
            expected += (kl - score.mean()) / len(batch.x)
        expected += module.kl_global() / 50
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0.02)


def test_gradients_match_finite_differences():
    module, batch = random_module(activation="silu"), a_batch()
    with torch.no_grad():
        module._logit.fill_(60.0 / GAIN)  # a straight-through mask has a gradient of its own making
    names = [name for name, _ in module.named_parameters() if name != "_logit"]
    parameters = [parameter for name, parameter in module.named_parameters() if name != "_logit"]

    def loss(*values):
        return torch.func.functional_call(
            Lossy(module), {f"module.{name}": value for name, value in zip(names, values)}, (batch,)
        )

    assert torch.autograd.gradcheck(loss, tuple(parameters), atol=1e-5, fast_mode=True)


class Lossy(torch.nn.Module):
    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch, Random.seeded(0, 1), weight=0.7, n_cells=9).loss


def test_the_encoder_sees_the_shift_only_where_it_is_asked_to():
    batch = a_batch()
    shift = torch.ones(4, 4, dtype=torch.double)
    for posterior, sees in (("correlated", True), ("mean_field", False)):
        module = random_module(posterior=posterior)
        assert torch.equal(module.encode(batch.x, shift)[0], module.encode(batch.x)[0]) is not sees


# --- the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_sparse_shifts_are_recovered(likelihood):
    world = plant_sparse_shifts(counts=likelihood == "nb")
    method = fitted(world.data, likelihood=likelihood, mask_prior=0.05, start_from="control")
    effects = method.effects()
    correlation, slope = effect_match(method, world)
    assert correlation > 0.9
    assert 0.6 < slope < 1.25
    assert control_error(method, world) < 0.1
    # genes that do nothing have no mask on; those that act have few
    on = effects["probability"] > 0.5
    assert not on[world.inert].any()
    assert on[~world.inert].any(axis=1).all()
    assert on[~world.inert].mean() < 0.7


def test_a_combination_adds_the_shifts_of_its_genes():
    method = fitted(plant(counts=False).data, likelihood="gaussian", epochs=3, predict="mean", start_from="control")
    shift = method.effects()["shift"]
    names = ("G01", "G04", "G06")
    rows = [method._perturbed.index(name) for name in names]
    with torch.no_grad():
        z = method._control["mean"] + torch.from_numpy(shift[rows].sum(0))
        expected = method.module.decode(z).mean(0).numpy()
    np.testing.assert_allclose(method.predict_one("+".join(names), "all")["mean"], expected, rtol=1e-5)


def test_contexts_start_from_their_own_control_cells():
    data = plant(n_single=3, n_cells=20, n_control=60, contexts=("a", "b", "c")).data
    with pytest.raises(MethodError, match="knows none of the 3 contexts; set `start_from: control`"):
        fitted(data, likelihood="gaussian")
    method = fitted(data, likelihood="gaussian", start_from="control")
    gap = method.predict_one("G00", "c")["mean"] - method.predict_one("G00", "a")["mean"]
    assert 0.5 < gap.mean() < 1.2  # planted: 1 on every gene


def test_the_representation_does_not_depend_on_the_label():
    data = plant().data
    method = fitted(data, likelihood="gaussian", epochs=3)
    found = method.represent(data.X)
    assert found.shape == (len(data.perturbation), 8)
    np.testing.assert_allclose(method.represent(data.X[5:9]), found[5:9], rtol=1e-4, atol=1e-5)


def test_data_it_cannot_use_are_refused():
    with pytest.raises(MethodError, match="count likelihood"):
        SAMSVAE().check(plant().data)
    method = fitted(plant().data, likelihood="gaussian", epochs=1)
    with pytest.raises(UnseenPerturbationError, match="SAMS-VAE never saw G44"):
        method.predict_one("G00+G44", "all")
    with pytest.raises(MethodError, match="context 'moon'"):
        method.predict_one("G00", "moon")
