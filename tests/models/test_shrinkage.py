"""Denoising against slow references and planted truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, sparse, stats

from perturbed.errors import MethodError
from perturbed.models.shrinkage import (
    Noise,
    denoise,
    measure_noise,
    shrink_low_rank,
    shrink_mixture,
    shrink_positive_part,
    shrink_singular_values,
)


def correlated(n_genes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A covariance of two strong factors and unequal variances, and its Cholesky root."""
    loadings = rng.normal(size=(n_genes, 2)) * [1.5, 0.8]
    scale = rng.uniform(0.3, 2.0, n_genes)
    covariance = scale[:, None] * (loadings @ loadings.T + np.eye(n_genes)) * scale
    return covariance, np.linalg.cholesky(covariance)


def cells_of(means: np.ndarray, root: np.ndarray, n: int, rng: np.random.Generator):
    row = np.repeat(np.arange(len(means)), n)
    cells = means[row] + rng.normal(size=(len(row), means.shape[1])) @ root.T
    averages = np.stack([cells[row == i].mean(axis=0) for i in range(len(means))])
    return sparse.csr_matrix(cells.astype(np.float32)), row, averages


def test_noise_is_the_scatter_within_conditions_whatever_the_effects():
    rng = np.random.default_rng(0)
    covariance, root = correlated(40, rng)
    cells, row, averages = cells_of(rng.normal(size=(30, 40)) * 5, root, 60, rng)
    noise = measure_noise(cells, row, averages, n_factors=10)
    residual = cells.toarray() - averages[row]
    np.testing.assert_allclose(noise.variance, (residual**2).sum(axis=0) / (1800 - 30), rtol=1e-4)
    assert (noise.strength[:2] > 5).all() and (noise.strength[2:] < 1).all()
    half = np.sqrt(noise.variance)
    fitted = half[:, None] * noise.power(np.eye(40), 1.0) * half
    assert np.linalg.norm(fitted - covariance) < 0.15 * np.linalg.norm(covariance)
    independent = measure_noise(cells, row, averages, n_factors=0)
    assert independent.factors.shape == (40, 0)
    assert np.linalg.norm(np.diag(independent.variance) - covariance) > 0.5 * np.linalg.norm(covariance)


def test_no_replicates_no_noise():
    X = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(MethodError, match="two training cells"):
        measure_noise(X, np.arange(3), np.eye(3), 2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_whitening_is_undone_and_its_variance_is_the_trace(power):
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.normal(size=(12, 3)))[0]
    noise = Noise(rng.uniform(0.2, 3, 12), u, np.array([9.0, 4.0, 2.0]), 0.7)
    rows = rng.normal(size=(5, 12))
    np.testing.assert_allclose(noise.colour(noise.whiten(rows, power), power), rows, atol=1e-10)
    correlation = 0.7 * np.eye(12) + (u * (noise.strength - 0.7)) @ u.T
    half = np.sqrt(noise.variance)
    sigma = half[:, None] * correlation * half
    map_ = noise.whiten(np.eye(12), power)
    assert noise.mean_variance(power) == pytest.approx(np.trace(map_.T @ sigma @ map_) / 12)
    if power == 1:
        np.testing.assert_allclose(map_.T @ sigma @ map_, np.eye(12), atol=1e-10)


def test_shrunk_singular_values_are_the_best_for_squared_error():
    """Against the oracle, which projects the truth on the noisy singular vectors."""
    rng = np.random.default_rng(2)
    m, n, sigma = 150, 600, 0.7
    truth = sum(
        s * np.outer(*(v / np.linalg.norm(v) for v in (rng.normal(size=m), rng.normal(size=n)))) for s in (90, 50, 30)
    )
    noisy = truth + sigma * rng.normal(size=(m, n))
    u, s, vt = np.linalg.svd(noisy, full_matrices=False)
    oracle = np.einsum("ik,ij,kj->k", u, truth, vt)
    shrunk = shrink_singular_values(s, (m, n), sigma)
    np.testing.assert_allclose(shrunk[:3], oracle[:3], rtol=0.05)
    np.testing.assert_array_equal(shrunk[3:], 0)
    np.testing.assert_allclose(shrink_low_rank(noisy, sigma), (u * shrunk) @ vt, atol=1e-8)
    np.testing.assert_allclose(shrink_low_rank(noisy.T, sigma), ((u * shrunk) @ vt).T, atol=1e-8)
    assert np.linalg.norm((u * shrunk) @ vt - truth) < 0.95 * np.linalg.norm((u[:, :3] * s[:3]) @ vt[:3] - truth)


def test_mixture_shrinks_as_the_posterior_mean_of_the_planted_prior():
    rng = np.random.default_rng(3)
    theta = np.where(rng.random((300, 200)) < 0.05, rng.normal(0, 6, (300, 200)), 0.0)
    sd = rng.uniform(0.5, 2.0, 200)
    x = sd * (theta + rng.normal(size=theta.shape))
    estimate = shrink_mixture(x, sd) / sd

    def posterior(z: float) -> float:
        def joint(t: float) -> float:
            return 0.05 * stats.norm.pdf(t, scale=6) * stats.norm.pdf(z, loc=t)

        top = integrate.quad(lambda t: t * joint(t), -40, 40, limit=200)[0]
        return top / (integrate.quad(joint, -40, 40, limit=200)[0] + 0.95 * stats.norm.pdf(z))

    for z in (1.0, 2.5, 4.0, 9.0):
        near = np.abs(x / sd - z) < 0.02 if z < 4 else np.abs(x / sd - z) < 0.3
        factor = np.median(estimate[near] / (x / sd)[near])
        assert factor == pytest.approx(posterior(z) / z, abs=0.08)
    error = ((estimate - theta) ** 2).mean()
    assert error < 0.5 * ((shrink_positive_part(x, sd) / sd - theta) ** 2).mean() < 0.5


def test_pure_noise_is_shrunk_away():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 400))
    assert (shrink_mixture(x, np.ones(400)) ** 2).mean() < 0.01
    noise = Noise(np.ones(400), np.zeros((400, 0)), np.zeros(0), 1.0)
    # Averaging over levels below the measured one lets a little through: the share kept stays under a tenth.
    assert (denoise(x, np.ones(60), noise) ** 2).mean() < 0.1
    assert (denoise(x, np.ones(60), noise, levels=(1.0,)) ** 2).mean() < 0.02


def test_positive_part():
    x = np.array([[-3.0, 0.5, 2.0]])
    np.testing.assert_allclose(shrink_positive_part(x, np.ones(3)), [[-3 * 8 / 9, 0, 2 * 3 / 4]])


def test_low_rank_and_sparse_signal_is_found_under_correlated_noise_and_unequal_numbers_of_cells():
    rng = np.random.default_rng(5)
    covariance, root = correlated(200, rng)
    low = rng.normal(size=(80, 3)) @ rng.normal(size=(3, 200)) * 0.6
    peaks = np.where(rng.random((80, 200)) < 0.01, rng.normal(0, 5, (80, 200)), 0.0)
    truth = low + peaks
    n = rng.integers(5, 60, 80).astype(float)
    noisy = truth + rng.normal(size=truth.shape) @ root.T / np.sqrt(n)[:, None]
    half = np.sqrt(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance / half[:, None] / half)
    known = Noise(half**2, vectors[:, -2:], values[-2:], float(values[:-2].mean()))
    blind = Noise(half**2, np.zeros((200, 0)), np.zeros(0), 1.0)

    def error(estimate: np.ndarray) -> float:
        return float(((estimate - truth) ** 2).sum())

    estimate = denoise(noisy, n, known)
    assert error(estimate) < 0.55 * error(noisy)
    assert error(estimate) < error(denoise(noisy, n, blind))  # knowing the correlation helps
    assert error(estimate) < error(denoise(noisy, np.full(80, n.mean()), known))  # and so does knowing the cells
    low_alone = shrink_low_rank(noisy, float(np.sqrt(np.trace(covariance) / 200 / np.exp(np.log(n).mean()))))
    assert error(estimate) < error(low_alone)
