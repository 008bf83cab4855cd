from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from perturbed.models.nn.likelihoods import Counts, gather_counts, gaussian_loss, nb_log1p_moments, nb_loss


def random_counts(n_cells=6, n_genes=9, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.negative_binomial(2, 0.4, size=(n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.6)
    return sparse.csr_matrix(dense.astype(np.float32)), dense


def as_counts(matrix) -> Counts:
    return gather_counts(matrix, np.arange(matrix.shape[0]), np.asarray(matrix.sum(1)).ravel())


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 9)])
def test_nb_matches_the_density_of_scipy(reduction, divisor):
    matrix, dense = random_counts()
    rng = np.random.default_rng(1)
    log_mean, log_theta = rng.normal(0, 1, dense.shape), rng.normal(0, 1, dense.shape[1])
    mean, theta = np.exp(log_mean), np.exp(log_theta)
    expected = -stats.nbinom.logpmf(dense, theta, theta / (theta + mean)).sum(axis=1).mean() / divisor
    counts = as_counts(matrix)._replace(value=as_counts(matrix).value.double())
    loss = nb_loss(counts, torch.tensor(log_mean), torch.tensor(log_theta), reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_nb_matches_torch_distributions_and_its_gradient():
    matrix, dense = random_counts(seed=2)
    log_mean = torch.randn(dense.shape, dtype=torch.double, generator=torch.manual_seed(0), requires_grad=True)
    log_theta = torch.randn(dense.shape[1], dtype=torch.double, requires_grad=True)
    counts = as_counts(matrix)._replace(value=as_counts(matrix).value.double())
    ours = nb_loss(counts, log_mean, log_theta, "sum")
    theirs = torch.distributions.NegativeBinomial(log_theta.exp(), logits=log_mean - log_theta)
    reference = -theirs.log_prob(torch.tensor(dense, dtype=torch.double)).sum(1).mean()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, (log_mean, log_theta)), torch.autograd.grad(reference, (log_mean, log_theta))
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_nb_stays_finite_far_out():
    matrix, dense = random_counts()
    for value in (-60.0, 60.0):
        assert math.isfinite(nb_loss(as_counts(matrix), torch.full(dense.shape, value), torch.zeros(9)).item())


def test_counts_are_gathered_in_the_order_asked_for():
    matrix, dense = random_counts()
    rows = np.array([4, 0, 4])
    counts = gather_counts(matrix, rows, dense.sum(axis=1))
    rebuilt = np.zeros(3 * dense.shape[1])
    rebuilt[counts.position.numpy()] = counts.value.numpy()
    np.testing.assert_array_equal(rebuilt.reshape(3, -1), dense[rows])
    np.testing.assert_array_equal(counts.size.numpy(), dense[rows].sum(axis=1))


def test_gaussian_without_noise_is_the_squared_error():
    x, mean = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [2.0, 1.0]])
    assert gaussian_loss(x, mean, None, "sum").item() == pytest.approx((1 + 4 + 9) / 2)
    assert gaussian_loss(x, mean, None, "mean").item() == pytest.approx((1 + 4 + 9) / 4)


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 5)])
def test_gaussian_with_noise_is_the_density_up_to_its_constant(reduction, divisor):
    generator = torch.manual_seed(1)
    x, mean = (torch.randn(7, 5, dtype=torch.double, generator=generator) for _ in range(2))
    log_sd = torch.randn(5, dtype=torch.double, generator=generator)
    density = torch.distributions.Normal(mean, log_sd.exp()).log_prob(x)
    expected = -(density + 0.5 * math.log(2 * math.pi)).sum(1).mean() / divisor
    assert gaussian_loss(x, mean, log_sd, reduction).item() == pytest.approx(expected.item(), rel=1e-12)


def test_moments_of_log_counts_match_a_sum_over_the_density():
    mean = np.array([[0.01, 0.7, 12.0], [0.3, 5.0, 400.0]])
    theta, scale = np.array([0.4, 3.0, 20.0]), np.array([0.5, 2.0])
    first, variance = nb_log1p_moments(mean, theta, scale)
    k = np.arange(20_000)
    for i in range(2):
        for j in range(3):
            p = stats.nbinom.pmf(k, theta[j], theta[j] / (theta[j] + mean[i, j]))
            value = np.log1p(scale[i] * k)
            assert first[i, j] == pytest.approx(p @ value, rel=1e-4)
            assert variance[i, j] == pytest.approx(p @ value**2 - (p @ value) ** 2, rel=1e-3)


def test_moments_at_a_mean_whose_zero_probability_underflows():
    first, _ = nb_log1p_moments(np.array([[3000.0]]), np.array([2000.0]), np.array([1.0]))
    assert first[0, 0] == pytest.approx(math.log1p(3000), abs=1e-3)
