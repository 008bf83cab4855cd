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

SHARES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Signal-to-noise ratios of each kernel that are averaged over."""


FLOOR = 0.05
"""Smallest slope of the logarithm's link that curvature is divided by."""


def curvature(effects: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Second-order terms of a combination, gene by gene (5, n_genes).

    The sum `Σ_a f_a`, the products `Σ_{a<b} f_a f_b` (synergy) and `Σ_{a<b} (|f_a| f_b + |f_b| f_a)`, which is odd
    (saturation or reinforcement towards either side); and both products over `1 − exp(−c)`. The latter is the slope of
    log(1 + x) in log x at the background c: effects that combine in the log-rate have their products over it.

    Parameters
    ----------
    effects
        Single effects of the genes combined (n_members, n_genes).
    background
        Log-normalised expression of control, c (n_genes,).
    """
    total = effects.sum(axis=0)
    even = (total**2 - (effects**2).sum(axis=0)) / 2
    odd = np.abs(effects).sum(axis=0) * total - (np.abs(effects) * effects).sum(axis=0)
    slope = np.maximum(-np.expm1(-np.maximum(background, 0)), FLOOR)
    return np.stack([total, even, odd, even / slope, odd / slope])


def saturation(total: np.ndarray, exponent: float, unit: float) -> float:
    """`(‖s‖ / unit)^(−exponent)`: what summed effects s are multiplied by, so that a response grows as a lower power.

    Parameters
    ----------
    total
        Summed effects s (n_genes,).
    exponent
        0 leaves the sum as it is.
    unit
        Size at which it is left as it is, > 0.
    """
    norm = float(np.linalg.norm(total))
    return (norm / unit) ** -exponent if norm > 0 else 1.0


def add_on_link(effects: np.ndarray, background: np.ndarray, offset: float, factor: float = 1.0) -> np.ndarray:
    """Effect of a combination whose members' effects add in the log of expression (n_genes,).

    `f⁻¹(f(c) + factor · Σ_a [f(c + e_a) − f(c)]) − c` with the link `f(m) = log(eᵐ − 1 + offset)`. For mean
    log-normalised expression m, `eᵐ − 1` stands for expression itself, in which effects multiply. A sum in m is too low
    for a weakly expressed gene: by c (f − 1)(g − 1) for fold changes f and g, and below zero where both fall.

    Parameters
    ----------
    effects
        Effects on log-normalised expression (n_members, n_genes).
    background
        Log-normalised expression of control, c (n_genes,); negative values count as 0.
    offset
        1 adds in m itself, 0 in the log of `eᵐ − 1`, which is −∞ for genes that are off.
    factor
        Multiplies the sum.
    """
    if offset == 1.0:
        return np.asarray(factor * effects.sum(axis=0))
    base = np.maximum(background, 0.0)
    link = np.log(np.expm1(base) + offset)
    steps = np.log(np.expm1(np.maximum(base + effects, 0.0)) + offset) - link
    sum_on_link = np.exp(link + factor * steps.sum(axis=0))
    return np.asarray(np.log1p(np.maximum(sum_on_link - offset, 0.0)) - base)


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
        Weights of `curvature` (n_terms,).
    share
        Posterior mean signal-to-noise ratio of the shared-gene and of the product kernel (2,).
    weights
        For each kernel the weights that its values are multiplied with, averaged over ratios: `share · (K + I)⁻¹ R`
        (2, n_combinations, n_genes).
    """

    slope: np.ndarray
    share: np.ndarray
    weights: np.ndarray

    def predict(self, terms: np.ndarray, kernels: np.ndarray) -> np.ndarray:
        """Interaction of a combination (n_genes,) from its `curvature` (n_terms, n_genes) and kernel values (2, n)."""
        return np.asarray(self.slope @ terms + np.einsum("kn,kng->g", kernels, self.weights))


def fit_interaction(terms: np.ndarray, kernels: np.ndarray, residual: np.ndarray) -> Interaction:
    """Empirical Bayes in closed form: curvature shrunk by left-out combinations, kernels averaged by their evidence.

    The least-squares weights of the curvature are multiplied by the share, between 0 and 1, that best predicts each
    combination from the others. What is left is matrix normal, `R ~ MN(0, K + I, τ²C)`, with K the weighted sum of
    kernels; ratios on a grid are weighed by their marginal likelihood with τ profiled out. Genes are correlated: the
    number of independent columns is taken as the participation ratio of `R Rᵀ`.

    Parameters
    ----------
    terms
        `curvature` of the training combinations (n, n_terms, n_genes).
    kernels
        The two kernels among them (2, n, n).
    residual
        Denoised effect minus the prior's (n, n_genes).
    """
    slope = _fit_curvature(terms, residual)
    rest = residual - np.einsum("k,nkg->ng", slope, terms)
    n, gram = len(rest), rest @ rest.T
    if not np.trace(gram) > 0:
        return Interaction(slope, np.zeros(2), np.zeros((2, *rest.shape)))
    columns = float(np.trace(gram) ** 2 / (gram**2).sum())
    ratios = np.array(list(product(SHARES, SHARES)))
    inverses = np.linalg.inv(np.tensordot(ratios, kernels, 1) + np.eye(n))
    scale = np.einsum("kij,ij->k", inverses, gram)
    evidence = 0.5 * columns * (np.linalg.slogdet(inverses)[1] - n * np.log(scale))
    posterior = np.exp(evidence - evidence.max())
    posterior /= posterior.sum()
    weights = np.einsum("k,kc,kij->cij", posterior, ratios, inverses) @ rest
    return Interaction(slope, posterior @ ratios, weights)


def _fit_curvature(terms: np.ndarray, residual: np.ndarray) -> np.ndarray:
    gram = np.einsum("nkg,nlg->nkl", terms, terms)
    cross = np.einsum("nkg,ng->nk", terms, residual)
    total, right = gram.sum(axis=0), cross.sum(axis=0)
    left_out = np.stack([_solve(total - own, right - part) for own, part in zip(gram, cross)])
    agreement = float(np.einsum("nk,nk->", left_out, cross))
    size = float(np.einsum("nk,nkl,nl->", left_out, gram, left_out))
    share = np.clip(agreement / size, 0.0, 1.0) if size > 0 else 0.0
    return np.asarray(share * _solve(total, right))


def _solve(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Least squares with a small ridge on scaled terms, which keeps collinear ones from running away."""
    scale = np.sqrt(np.diag(gram))
    scale = np.where(scale > 0, scale, 1.0)
    system = gram / np.outer(scale, scale) + 1e-3 * np.eye(len(gram))
    return np.asarray(np.linalg.solve(system, cross / scale) / scale)
