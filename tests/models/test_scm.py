from __future__ import annotations

import pytest
import torch

from perturbed.models.nn.scm import ResponseSCM, fill_strictly_lower, kl_diagonal, solve_structural


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
