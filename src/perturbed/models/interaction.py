"""What combinations do beyond the sum of their singles: population curvature and a Gaussian process over pairs.

To first order in the edges, a structural causal model under a combination responds by `Σ_a μ_a` plus terms bilinear in
the single responses: `(I − Λ(u))⁻¹ μ(u) ≈ μ(u) + Λ(u) μ(u)` with both linear in u. A bilinear map with independent
normal weights, seen at pairs (a, b), is a Gaussian process with the product kernel used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

SHARES = (0.0, 0.03, 0.1, 0.3, 1.0)
"""Signal-to-noise ratios of each kernel that are tried."""
RIDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the fitted curvature that are tried."""


def curvature(effects: np.ndarray) -> np.ndarray:
    """Second-order terms of a combination, gene by gene (3, n_genes).

    The sum `Σ_a f_a`, the products `Σ_{a<b} f_a f_b` (synergy), and `Σ_{a<b} (|f_a| f_b + |f_b| f_a)`, which is odd
    (saturation or reinforcement towards either side).

    Parameters
    ----------
    effects
        Single effects of the genes combined (n_members, n_genes).
    """
    total = effects.sum(axis=0)
    even = (total**2 - (effects**2).sum(axis=0)) / 2
    odd = np.abs(effects).sum(axis=0) * total - (np.abs(effects) * effects).sum(axis=0)
    return np.stack([total, even, odd])


def saturate_norm(total: np.ndarray, strength: float, unit: float) -> np.ndarray:
    """`s / (1 + strength · ‖s‖ / unit)`: the sum of effects, shortened the more the longer it is (..., n_genes)."""
    if not unit > 0:
        return total
    return np.asarray(total / (1 + strength * np.linalg.norm(total, axis=-1, keepdims=True) / unit))


def shared_kernel(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Number of genes that two combinations share (n_first, n_second)."""
    return np.array([[len(np.intersect1d(p, q)) for q in second] for p in first], dtype=np.float64)


def product_kernel(first: Sequence[np.ndarray], second: Sequence[np.ndarray], similarity: np.ndarray) -> np.ndarray:
    """Covariance of bilinear maps of the members' responses, `Σ_{ab} Σ_{cd} (c_ac c_bd + c_ad c_bc)`.

    Parameters
    ----------
    first, second
        Combinations, as rows of `similarity`.
    similarity
        Cosines of the single effects (n_singles, n_singles).
    """

    def entry(p: np.ndarray, q: np.ndarray) -> float:
        return sum(
            similarity[a, c] * similarity[b, d] + similarity[a, d] * similarity[b, c]
            for (a, b), (c, d) in product(combinations(p, 2), combinations(q, 2))
        )

    return np.array([[entry(p, q) for q in second] for p in first], dtype=np.float64)


@dataclass(frozen=True)
class Interaction:
    """A fitted interaction.

    Parameters
    ----------
    slope
        Weights of `curvature` (3,).
    share
        Weights of the shared-gene and of the product kernel (2,), over the noise.
    weights
        `(K + I)⁻¹ R` (n_combinations, n_genes).
    """

    slope: np.ndarray
    share: np.ndarray
    weights: np.ndarray


def fit_interaction(
    terms: np.ndarray, kernels: np.ndarray, residual: np.ndarray, observed: np.ndarray
) -> Interaction:
    """Curvature and kernel weights by leave-one-combination-out squared error, all in closed form.

    Parameters
    ----------
    terms
        `curvature` of the training combinations (n, 3, n_genes).
    kernels
        The two kernels among them (2, n, n).
    residual
        Denoised effect minus the prior's (n, n_genes).
    observed
        The same, not denoised: what left-out predictions are judged by (n, n_genes).
    """
    n = len(residual)
    gram = np.einsum("nkg,nlg->nkl", terms, terms)
    cross = np.einsum("nkg,ng->nk", terms, residual)
    full = _ridge(gram.sum(axis=0), cross.sum(axis=0))
    left = np.stack([_ridge(gram.sum(axis=0) - gram[i], cross.sum(axis=0) - cross[i]) for i in range(n)])
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    for ridge in RIDGES:
        fitted = np.einsum("k,nkg->ng", ridge * full, terms)
        gap = observed - ridge * np.einsum("nk,nkg->ng", left, terms)
        rest = residual - fitted
        inner = rest @ rest.T
        both = gap @ rest.T
        gap_square = float((gap**2).sum())
        for shared, bilinear in product(SHARES, SHARES):
            hat = _leave_one_out(shared * kernels[0] + bilinear * kernels[1])
            error = gap_square - 2 * float((hat * both).sum()) + float(np.einsum("ij,jk,ik->", hat, inner, hat))
            if best is None or error < best[0] * (1 - 1e-9):
                best = (error, ridge * full, np.array([shared, bilinear]), rest)
    assert best is not None
    _, slope, share, rest = best
    weights = np.linalg.solve(np.tensordot(share, kernels, 1) + np.eye(n), rest)
    return Interaction(slope, share, weights)


def _ridge(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Least squares with a floor that keeps collinear terms from running away."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    return np.asarray(np.linalg.solve(gram / np.outer(scale, scale) + 1e-3 * np.eye(len(gram)), cross / scale) / scale)


def _leave_one_out(kernel: np.ndarray) -> np.ndarray:
    """Hat matrix (n, n), zero diagonal: row i predicts i from the others, `I − diag(1/A_ii) A`, `A = (K + I)⁻¹`."""
    inverse = np.linalg.inv(kernel + np.eye(len(kernel)))
    return np.asarray(np.eye(len(kernel)) - inverse / np.diag(inverse)[:, None])
