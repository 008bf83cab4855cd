from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from perturbed.models.nn.scm import (
    AutoregressiveNoise,
    ResponseSCM,
    fill_strictly_lower,
    kl_diagonal,
    solve_structural,
)


def random_scm(condition_map="linear", n_perturbed=6, n_nu=4, n_iota=3, seed=0, **options) -> ResponseSCM:
    """An SCM away from its start, in double precision."""
    torch.manual_seed(seed)
    scm = ResponseSCM(n_perturbed, n_nu, n_iota, condition_map=condition_map, hidden=8, **options).double()
    with torch.no_grad():
        for parameter in scm.parameters():
            parameter.normal_(0, 0.4)
    return scm


def one_hots(*conditions: tuple[int, ...], n=6) -> torch.Tensor:
    u = torch.zeros(len(conditions), n, dtype=torch.double)
    for row, genes in zip(u, conditions):
        row[list(genes)] = 1
    return u


def test_filling_puts_every_entry_below_the_diagonal_once():
    values = torch.arange(1.0, 7.0).repeat(2, 1)
    filled = fill_strictly_lower(values, 4)
    assert torch.equal(filled[0], torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0], [4, 5, 6, 0.0]]))
    assert torch.equal(filled[0], filled[1])


def test_triangular_solve_matches_the_explicit_inverse_and_the_neumann_series():
    torch.manual_seed(0)
    edges = torch.tril(torch.randn(5, 7, 7, dtype=torch.double), -1)
    right = torch.randn(5, 7, 2, dtype=torch.double)
    solved = solve_structural(edges, right)
    torch.testing.assert_close(solved, torch.linalg.inv(torch.eye(7, dtype=torch.double) - edges) @ right)
    series = sum(torch.linalg.matrix_power(edges, k) for k in range(7)) @ right
    torch.testing.assert_close(solved, series)


def test_respond_satisfies_the_structural_equations_node_by_node():
    scm = random_scm()
    mechanisms = scm(one_hots((), (1,), (0, 2, 5)))
    condition = torch.tensor([2, 0, 1, 2])
    z_iota, noise = torch.randn(4, 3, dtype=torch.double), torch.randn(4, 4, dtype=torch.double)
    z_nu = scm.respond(mechanisms, condition, z_iota, noise)
    for cell, c in enumerate(condition.tolist()):
        z = []
        for i in range(4):
            parents = sum(mechanisms.edges[c, i, j] * z[j] for j in range(i))
            background = mechanisms.inputs[c, i] @ z_iota[cell]
            z.append(parents + background + mechanisms.shift[c, i] + noise[cell, i])
        torch.testing.assert_close(z_nu[cell], torch.stack(z))


@pytest.mark.parametrize("condition_map", ["linear", "mlp"])
def test_the_zero_condition_is_the_base(condition_map):
    scm = random_scm(condition_map)
    mechanisms = scm(one_hots((), (3,)))
    edges, inputs = scm.base.split(scm.sizes[:2])
    torch.testing.assert_close(mechanisms.edges[0], fill_strictly_lower(edges[None], 4)[0])
    torch.testing.assert_close(mechanisms.inputs[0], inputs.view(4, 3))
    # f(0) − f(0) of the MLP is zero up to the order of its sums
    assert mechanisms.shift[0].abs().max() < 1e-12
    assert mechanisms.log_variance[0].abs().max() < 1e-12
    assert mechanisms.shift[1].abs().max() > 0.1


def test_a_linear_map_adds_the_shifts_of_any_number_of_genes():
    scm = random_scm()
    base, a, b, c, triple = scm(one_hots((), (0,), (2,), (5,), (0, 2, 5)))._replace().edges
    torch.testing.assert_close(triple - base, (a - base) + (b - base) + (c - base))


def test_an_mlp_map_does_not_add():
    shift = random_scm("mlp")(one_hots((0,), (2,), (0, 2))).shift
    assert (shift[0] + shift[1] - shift[2]).abs().max() > 1e-3


@pytest.mark.parametrize("condition_map", ["linear", "mlp"])
def test_a_new_scm_is_the_identity(condition_map):
    scm = ResponseSCM(6, 4, 3, condition_map=condition_map)
    noise = torch.randn(2, 4)
    mechanisms = scm(one_hots((), (1, 2)).float())
    assert torch.equal(scm.respond(mechanisms, torch.tensor([0, 1]), torch.randn(2, 3), noise), noise)


def test_fixed_variance_is_one():
    assert not random_scm(learn_variance=False)(one_hots((1, 2))).log_variance.any()


def test_kl_against_torch_distributions():
    torch.manual_seed(0)
    mean, variance, prior = torch.randn(8, 5), torch.rand(8, 5) + 0.1, torch.randn(8, 5)
    q = torch.distributions.Normal(mean, variance.sqrt())
    p = torch.distributions.Normal(torch.zeros(8, 5), torch.exp(0.5 * prior))
    torch.testing.assert_close(kl_diagonal(mean, variance, prior), torch.distributions.kl_divergence(q, p).sum(1))
    standard = torch.distributions.Normal(torch.zeros(8, 5), torch.ones(8, 5))
    torch.testing.assert_close(kl_diagonal(mean, variance), torch.distributions.kl_divergence(q, standard).sum(1))


def test_kl_of_the_noise_is_the_kl_of_the_response_against_the_scm_prior():
    """The noise's closed KL, the response's full-covariance KL and a Monte Carlo estimate agree."""
    scm = random_scm(seed=3)
    mechanisms = scm(one_hots((1, 4)))
    z_iota = torch.randn(1, 3, dtype=torch.double)
    mean, variance = torch.randn(1, 4, dtype=torch.double), torch.rand(1, 4, dtype=torch.double) + 0.2
    closed = kl_diagonal(mean, variance, mechanisms.log_variance)

    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.double) - mechanisms.edges[0])
    offset = mechanisms.inputs[0] @ z_iota[0] + mechanisms.shift[0]
    normal = torch.distributions.MultivariateNormal
    q = normal(inverse @ (mean[0] + offset), inverse @ torch.diag(variance[0]) @ inverse.T)
    p = normal(inverse @ offset, inverse @ torch.diag(mechanisms.log_variance[0].exp()) @ inverse.T)
    torch.testing.assert_close(closed[0], torch.distributions.kl_divergence(q, p))

    n = 200_000
    torch.manual_seed(5)
    noise = mean + variance.sqrt() * torch.randn(n, 4, dtype=torch.double)
    with torch.no_grad():
        z_nu = scm.respond(mechanisms, torch.zeros(n, dtype=torch.long), z_iota.expand(n, 3), noise)
        ratio = q.log_prob(z_nu) - p.log_prob(z_nu)
    assert abs(ratio.mean() - closed[0]) < 5 * ratio.std() / n**0.5


def test_prior_mean_is_where_zero_noise_lands():
    scm = random_scm()
    mechanisms = scm(one_hots((0, 3)))
    z_iota = torch.randn(1, 3, dtype=torch.double)
    n = 50_000
    noise = torch.exp(0.5 * mechanisms.log_variance) * torch.randn(n, 4, dtype=torch.double)
    sampled = scm.respond(mechanisms, torch.zeros(n, dtype=torch.long), z_iota.expand(n, 3), noise)
    at_zero = scm.respond(mechanisms, torch.tensor([0]), z_iota, torch.zeros(1, 4, dtype=torch.double))
    assert ((sampled.mean(0) - at_zero[0]).abs() < 5 * sampled.std(0) / n**0.5).all()


def test_gradients_match_finite_differences():
    scm = random_scm()
    u, condition = one_hots((0,), (1, 2)), torch.tensor([0, 1, 1])
    z_iota = torch.randn(3, 3, dtype=torch.double, requires_grad=True)
    noise = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert scm.linear is not None
    weights = (scm.linear.weight, scm.base)

    def respond(z, e, weight, base):
        m = torch.func.functional_call(scm, {"linear.weight": weight, "base": base}, (u,))
        return scm.respond(m, condition, z, e)

    assert torch.autograd.gradcheck(respond, (z_iota, noise, *weights))


# --- the autoregressive posterior ---------------------------------------------------------------------------------


def random_noise(n=3, d=5, seed=0) -> AutoregressiveNoise:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, d, generator=g, dtype=torch.double)
    variance = torch.rand(n, d, generator=g, dtype=torch.double) + 0.2
    return AutoregressiveNoise(mean, variance, 0.6 * torch.randn(n, d, d, generator=g, dtype=torch.double).tril(-1))


def as_distribution(q: AutoregressiveNoise) -> torch.distributions.MultivariateNormal:
    inverse = torch.linalg.inv(torch.eye(q.mean.shape[1], dtype=torch.double) - q.regression)
    return torch.distributions.MultivariateNormal(q.mean, inverse @ torch.diag_embed(q.variance) @ inverse.mT)


def test_the_autoregressive_density_is_a_product_of_conditionals_and_a_joint_gaussian():
    q = random_noise()
    noise = torch.randn(3, 5, dtype=torch.double)
    torch.testing.assert_close(q.log_density(noise), as_distribution(q).log_prob(noise))
    total = torch.zeros(3, dtype=torch.double)
    for i in range(5):
        before = (q.regression[:, i, :i] * (noise - q.mean)[:, :i]).sum(1)
        total += torch.distributions.Normal(q.mean[:, i] + before, q.variance[:, i].sqrt()).log_prob(noise[:, i])
    torch.testing.assert_close(q.log_density(noise), total)


def test_the_autoregressive_kl_against_torch_and_monte_carlo():
    q = random_noise()
    log_variance = torch.linspace(-1, 1, 15, dtype=torch.double).view(3, 5)
    prior = torch.distributions.MultivariateNormal(torch.zeros_like(q.mean), torch.diag_embed(log_variance.exp()))
    torch.testing.assert_close(q.kl(log_variance), torch.distributions.kl_divergence(as_distribution(q), prior))
    n = 20_000
    generator = torch.Generator().manual_seed(1)
    for i in range(3):
        one = AutoregressiveNoise(*(value[i].expand(n, *value[i].shape) for value in q))
        noise = one.sample(torch.randn(n, 5, generator=generator, dtype=torch.double))
        ratio = one.log_density(noise) - torch.distributions.Normal(0, (0.5 * log_variance[i]).exp()).log_prob(
            noise
        ).sum(1)
        assert abs(ratio.mean() - q.kl(log_variance)[i]) < 5 * ratio.std() / n**0.5


def test_without_regression_it_is_the_diagonal_posterior():
    q = random_noise()._replace(regression=torch.zeros(3, 5, 5, dtype=torch.double))
    log_variance = torch.randn(3, 5, dtype=torch.double)
    draws = torch.randn(3, 5, dtype=torch.double)
    torch.testing.assert_close(q.kl(log_variance), kl_diagonal(q.mean, q.variance, log_variance))
    torch.testing.assert_close(q.sample(draws), q.mean + q.variance.sqrt() * draws)


def test_only_the_autoregressive_posterior_closes_the_gap_to_the_evidence():
    """A linear-Gaussian observation correlates latents a posteriori: the exact posterior is autoregressive."""
    g = torch.Generator().manual_seed(0)
    d, noise = 4, 0.3
    w = torch.randn(6, d, generator=g, dtype=torch.double)
    x = torch.randn(6, generator=g, dtype=torch.double)
    precision = torch.eye(d, dtype=torch.double) + w.T @ w / noise
    mean = torch.linalg.solve(precision, w.T @ x / noise)
    lower = torch.linalg.cholesky(torch.linalg.inv(precision))
    scale = lower.diagonal()
    regression = torch.eye(d, dtype=torch.double) - torch.linalg.inv(lower / scale)

    def elbo(q: AutoregressiveNoise) -> Tensor:
        covariance = as_distribution(q).covariance_matrix[0]
        residual = (x - w @ q.mean[0]).square().sum() + (w @ covariance @ w.T).trace()
        reconstruction = -0.5 * residual / noise - 3 * math.log(2 * math.pi * noise)
        return reconstruction - q.kl(torch.zeros(1, d, dtype=torch.double))[0]

    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(6, dtype=torch.double), w @ w.T + noise * torch.eye(6, dtype=torch.double)
    ).log_prob(x)
    exact = AutoregressiveNoise(mean[None], scale.square()[None], regression[None])
    torch.testing.assert_close(elbo(exact), evidence)
    best_diagonal = AutoregressiveNoise(mean[None], 1 / precision.diagonal()[None], torch.zeros(1, d, d).double())
    assert elbo(best_diagonal) < evidence - 0.1
