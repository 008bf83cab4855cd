"""Distances between two samples of cells, by matrix products."""

from __future__ import annotations

import numpy as np


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of every row of `x` to every row of `y` (n_x, n_y).

    Both are centred first, so that little is lost in ``‖x‖² + ‖y‖² − 2xy``; what rounding leaves below 0 is 0.
    """
    centre = (x.mean(axis=0) + y.mean(axis=0)) / 2
    x, y = np.asarray(x - centre, dtype=np.float64), np.asarray(y - centre, dtype=np.float64)
    squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2 * (x @ y.T)
    return np.maximum(squared, 0.0)


def _off_diagonal_mean(matrix: np.ndarray) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _within(x: np.ndarray) -> np.ndarray:
    squared = squared_distances(x, x)
    np.fill_diagonal(squared, 0.0)
    return squared


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """E-distance with Euclidean distances, as a U-statistic.

    ``E = 2 mean‖xᵢ − yⱼ‖ − mean_{i≠j}‖xᵢ − xⱼ‖ − mean_{i≠j}‖yᵢ − yⱼ‖``: its expectation is 0 for two samples of one
    distribution, whatever their sizes; it can be negative. Each sample needs two rows.
    """
    between = np.sqrt(squared_distances(x, y)).mean()
    return float(2 * between - _off_diagonal_mean(np.sqrt(_within(x))) - _off_diagonal_mean(np.sqrt(_within(y))))


def median_bandwidth(x: np.ndarray) -> float:
    """Median Euclidean distance between two different rows of `x`."""
    upper = np.triu_indices(len(x), k=1)
    return float(np.median(np.sqrt(_within(x)[upper])))


def mmd_rbf(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """Squared maximum mean discrepancy with one Gaussian kernel, unbiased.

    ``mean_{i≠j} k(xᵢ,xⱼ) + mean_{i≠j} k(yᵢ,yⱼ) − 2 mean k(xᵢ,yⱼ)`` with ``k(a,b) = exp(−‖a−b‖² / (2 bandwidth²))``.
    """

    def kernel(squared: np.ndarray) -> np.ndarray:
        return np.exp(-squared / (2 * bandwidth**2))

    between = kernel(squared_distances(x, y)).mean()
    return float(_off_diagonal_mean(kernel(_within(x))) + _off_diagonal_mean(kernel(_within(y))) - 2 * between)


def mmd_multiscale(
    x: np.ndarray, y: np.ndarray, *, width: float = 1000.0, factor: float = 2.0, n_kernels: int = 10
) -> float:
    """Squared maximum mean discrepancy summed over Gaussian kernels of fixed widths, as a V-statistic.

    The kernels are ``exp(−‖a−b‖² / wᵢ)`` with ``wᵢ = width · factor^(i − n_kernels // 2)``, i = 0 … n_kernels − 1.
    The diagonal counts, so the value is never negative and is above 0 for two samples of one distribution.
    """
    widths = width * factor ** (np.arange(n_kernels) - n_kernels // 2)
    squared = _within(np.vstack([x, y]))
    kernel = np.sum([np.exp(-squared / w) for w in widths], axis=0)
    n = len(x)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())
