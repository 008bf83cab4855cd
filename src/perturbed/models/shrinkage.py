"""Denoising of condition means: noise known from replicate cells, optimal singular-value shrinkage, normal mixtures.

Pure functions on NumPy arrays. Rows are conditions, columns genes; a mean over n cells has the noise covariance Σ/n,
with Σ the covariance of cells *within* conditions, which replicate cells measure without any model of the effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from perturbed.errors import MethodError

FLOOR = 1e-4
"""Smallest variance of a gene, as a share of the mean over genes: a gene without any noise would weigh infinitely."""
SCALES = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0])
"""Standard deviations of the mixture's components, in units of the noise (a grid, as in Stephens 2017)."""
LEVELS = (0.8, 0.9, 1.0, 1.1, 1.2)
"""Noise levels that `denoise` averages over, in units of the measured one."""
N_BINS = 512
N_STEPS = 200
OVERSAMPLING, N_POWER = 10, 5
"""Further columns and power iterations of the randomised decomposition."""


@dataclass(frozen=True)
class Noise:
    """Within-condition covariance of cells, `Σ = D^½ C D^½` with `C = ψ I + U diag(ℓ − ψ) Uᵀ`.

    Parameters
    ----------
    variance
        Diagonal of Σ, floored (n_genes,).
    factors
        U: orthonormal leading eigenvectors of the correlation C (n_genes, k).
    strength
        ℓ: their eigenvalues, freed of sampling inflation (k,).
    rest
        ψ: the common variance of all other directions.
    """

    variance: np.ndarray
    factors: np.ndarray
    strength: np.ndarray
    rest: float

    def power(self, rows: np.ndarray, exponent: float) -> np.ndarray:
        """`rows · C^exponent` (n, n_genes)."""
        inside = self.strength**exponent - self.rest**exponent
        return rows * self.rest**exponent + (rows @ self.factors * inside) @ self.factors.T

    def whiten(self, rows: np.ndarray, power: float) -> np.ndarray:
        """`rows · D^(−power/2) C^(−power/2)`: noise is white at power 1, untouched at 0."""
        return self.power(rows * self.variance ** (-power / 2), -power / 2)

    def colour(self, rows: np.ndarray, power: float) -> np.ndarray:
        """Inverse of `whiten`."""
        return self.power(rows, power / 2) * self.variance ** (power / 2)

    def mean_variance(self, power: float) -> float:
        """Variance of one cell per direction after `whiten`, averaged: `tr(C^−a D^½(1−a) C D^½(1−a)) / G`."""
        e = self.variance ** ((1 - power) / 2)
        scaled = self.factors * e[:, None]
        down, up = self.strength**-power - self.rest**-power, self.strength - self.rest
        cross = self.factors.T @ scaled
        own = (scaled**2).sum(axis=0)
        total = self.rest ** (1 - power) * float(e @ e) + self.rest * float(down @ own)
        total += self.rest**-power * float(up @ own) + float(np.einsum("i,ij,j,ji->", down, cross, up, cross.T))
        return total / len(e)


def measure_noise(X: sparse.csr_matrix, row: np.ndarray, means: np.ndarray, n_factors: int) -> Noise:
    """Noise covariance from the scatter of cells about the mean of their own condition.

    Parameters
    ----------
    X
        Cells, CSR (n_cells, n_genes).
    row
        Condition of each cell (n_cells,), a row of `means`.
    means
        Mean profile of each condition (n_conditions, n_genes).
    n_factors
        Correlated directions kept at most (cell cycle, depth, state); 0 takes genes as independent. Only those above
        the edge of pure noise are kept, with the eigenvalues of Baik and Silverstein's spiked model inverted.

    Raises
    ------
    MethodError
        If no condition has two cells that differ.
    """
    n_cells, n_genes = X.shape
    count = np.bincount(row, minlength=len(means)).astype(np.float64)
    freedom = n_cells - int((count > 0).sum())
    square = np.asarray(X.multiply(X).sum(axis=0), dtype=np.float64).ravel()
    scatter = np.maximum(square - count @ means**2, 0.0)
    if freedom < 1 or not scatter.sum() > 0:
        raise MethodError("no condition has two training cells that differ, so the noise of a mean cannot be measured")
    variance = scatter / freedom
    variance = np.maximum(variance, FLOOR * variance.mean())
    k = min(n_factors, n_genes - 1, freedom - 1, n_cells - 1)
    none = Noise(variance, np.zeros((n_genes, 0)), np.zeros(0), 1.0)
    if k < 1:
        return none
    weight = 1.0 / np.sqrt(variance * freedom)
    indicator = sparse.csr_matrix((np.ones(n_cells), (np.arange(n_cells), row)), shape=(n_cells, len(means)))
    cells = X.astype(np.float64)

    def forward(basis: np.ndarray) -> np.ndarray:
        scaled = basis * weight[:, None]
        return np.asarray(cells @ scaled - indicator @ (means @ scaled))

    def backward(basis: np.ndarray) -> np.ndarray:
        return np.asarray((cells.T @ basis - means.T @ (indicator.T @ basis)) * weight[:, None])

    # Randomised subspace iteration (Halko, Martinsson and Tropp 2011); drawn over cells, so gene order has no say.
    width = min(k + OVERSAMPLING, n_genes, n_cells)
    basis = np.linalg.qr(backward(np.random.default_rng(0).normal(size=(n_cells, width))))[0]
    for _ in range(N_POWER):
        basis = np.linalg.qr(backward(forward(basis)))[0]
    inside = forward(basis)
    values, vectors = np.linalg.eigh(inside.T @ inside)
    vectors = basis @ vectors
    return _keep_spikes(variance, values[::-1][:k], vectors.T[::-1][:k], n_genes / freedom)


def _keep_spikes(variance: np.ndarray, eigenvalues: np.ndarray, vectors: np.ndarray, gamma: float) -> Noise:
    """Spiked model: `λ = ℓ (1 + γψ / (ℓ − ψ))` above the edge `ψ (1 + √γ)²` inverted; the trace of C stays n_genes."""
    n_genes, rest = len(variance), 1.0
    for _ in range(20):  # ψ and the number of spikes depend on each other
        b = eigenvalues / rest + 1 - gamma
        spike = eigenvalues > rest * (1 + np.sqrt(gamma)) ** 2
        strength = rest * (b[spike] + np.sqrt(np.maximum(b[spike] ** 2 - 4 * eigenvalues[spike] / rest, 0))) / 2
        updated = max((n_genes - strength.sum()) / max(n_genes - len(strength), 1), FLOOR)
        if abs(updated - rest) < 1e-9:
            break
        rest = updated
    strength = np.maximum(strength, rest)
    return Noise(variance, np.ascontiguousarray(vectors[spike].T), strength, rest)


def shrink_singular_values(values: np.ndarray, shape: tuple[int, int], noise: float) -> np.ndarray:
    r"""Optimal shrinker of singular values for squared error (Gavish and Donoho 2017, IEEE Trans. Inf. Theory 63:2137).

    :math:`\sigma\sqrt{n}\,\sqrt{(y^2-\beta-1)^2-4\beta}/y` for :math:`y=s/(\sigma\sqrt{n}) > 1+\sqrt\beta`, else 0;
    :math:`\beta=m/n\le 1`.

    Parameters
    ----------
    values
        Singular values of the noisy matrix.
    shape
        Its shape.
    noise
        σ: standard deviation of the noise of an entry.
    """
    m, n = sorted(shape)
    beta, unit = m / n, noise * np.sqrt(n)
    y = values / unit
    inside = np.where(y > 1 + np.sqrt(beta), (y**2 - beta - 1) ** 2 - 4 * beta, 0.0)
    return np.asarray(unit * np.sqrt(np.maximum(inside, 0)) / np.where(y > 0, y, 1.0))


def shrink_low_rank(matrix: np.ndarray, noise: float) -> np.ndarray:
    """`matrix` with its singular values shrunk for white noise of standard deviation `noise`."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    square, vectors = np.linalg.eigh(wide @ wide.T)  # of the short side: small beside a full decomposition
    values = np.sqrt(np.maximum(square, 0))
    shrunk = shrink_singular_values(values, wide.shape, noise)
    kept = shrunk > 0
    u = vectors[:, kept]
    low = (u * (shrunk[kept] / values[kept])) @ (u.T @ wide)
    return np.asarray(low if wide is matrix else low.T)


def shrink_mixture(matrix: np.ndarray, noise: np.ndarray) -> np.ndarray:
    r"""Posterior mean of entries under a scale mixture of normals fitted to them all (Stephens 2017, Biostatistics 18).

    :math:`x \sim N(\theta, s^2)`, :math:`\theta/s \sim \sum_k \pi_k N(0, \tau_k^2)`, τ on a fixed grid that holds 0;
    π by expectation–maximisation on the histogram of |x|/s, in 512 bins, which makes the cost independent of the size.

    Parameters
    ----------
    matrix
        x.
    noise
        s, of the same shape or broadcast to it.
    """
    z = np.abs(matrix / noise)
    step = np.log1p(max(float(z.max(initial=0.0)), 1.0)) / N_BINS
    place = np.log1p(z) / step  # bins of equal width in log(1 + z): fine where most entries are
    left = np.minimum(place.astype(np.int64), N_BINS - 1)
    weight = np.bincount(left.ravel(), minlength=N_BINS).astype(np.float64)
    variance = SCALES**2 + 1

    def density(at: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-0.5 * at[:, None] ** 2 / variance) / np.sqrt(variance) + 1e-300)

    centres = density(np.expm1(step * (np.arange(N_BINS) + 0.5)))
    share = np.full(len(SCALES), 1 / len(SCALES))
    for _ in range(N_STEPS):
        joint = centres * share
        share = weight @ (joint / joint.sum(axis=1, keepdims=True)) / weight.sum()
    joint = density(np.expm1(step * np.arange(N_BINS + 1))) * share
    factor = joint @ (SCALES**2 / variance) / joint.sum(axis=1)
    place -= left
    return np.asarray(matrix * (factor[left] * (1 - place) + factor[left + 1] * place))


def shrink_positive_part(matrix: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Entry-wise empirical Bayes of one observation each: `x · max(1 − s²/x², 0)`."""
    square = matrix**2
    return np.asarray(matrix * np.where(square > noise**2, 1 - noise**2 / np.maximum(square, 1e-300), 0.0))


def denoise(
    matrix: np.ndarray,
    n_cells: np.ndarray,
    noise: Noise,
    *,
    whitening: float = 0.5,
    n_rounds: int = 5,
    levels: Sequence[float] = LEVELS,
) -> np.ndarray:
    """Low rank plus sparse: what programs explain by singular values, what single genes do by a normal mixture.

    The two are fitted in turns, each to what the other leaves: L to B − S by `shrink_low_rank`, S to B − L by
    `shrink_mixture`. Rows are first scaled to the noise of a common number of cells. Half-whitened noise is white on
    average only, so that no single level is right for every direction: the estimate is the mean over `levels`, which
    makes the hard threshold of the singular values a soft one.

    Parameters
    ----------
    matrix
        B: deviations of condition means from a centre (n_conditions, n_genes).
    n_cells
        Cells behind each row (n_conditions,).
    noise
        Covariance of the cells.
    whitening
        Power of Σ^(−½) in which singular values are shrunk: 1 weighs directions by their noise, 0 by the squared error
        that is to be small.
    n_rounds
        Turns.
    levels
        Noise levels to average over, in units of the measured one.

    Returns
    -------
    numpy.ndarray
        Estimate of the noise-free B (n_conditions, n_genes).
    """
    common = float(np.exp(np.mean(np.log(n_cells))))
    scale = np.sqrt(n_cells / common)[:, None]
    scaled = matrix * scale
    unit = np.sqrt(noise.mean_variance(whitening) / common)
    sd = np.sqrt(noise.variance / common)
    total = np.zeros_like(scaled)
    for level in levels:
        low = rest = np.zeros_like(scaled)
        for _ in range(n_rounds):
            low = noise.colour(shrink_low_rank(noise.whiten(scaled - rest, whitening), unit * level), whitening)
            rest = shrink_mixture(scaled - low, sd)
        total += low + rest
    return np.asarray(total / (len(levels) * scale))
