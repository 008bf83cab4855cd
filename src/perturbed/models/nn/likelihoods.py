"""Observation models: Gaussian on log-normalised expression, negative binomial on counts."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

Reduction = Literal["mean", "sum"]


class Counts(NamedTuple):
    """The non-zero counts of a batch of cells, and their sums."""

    position: Tensor
    """Index `cell * n_genes + gene` of every non-zero count (n_nonzero,), int64."""
    value: Tensor
    """The counts there (n_nonzero,)."""
    size: Tensor
    """Sum over the genes of each cell (n_cells,)."""


def gather_counts(matrix: sparse.csr_matrix, rows: np.ndarray, size: np.ndarray, device: str = "cpu") -> Counts:
    """The counts of some rows of a CSR matrix; `size` holds the sum of every row of the matrix."""
    chosen = matrix[rows]
    cell = np.repeat(np.arange(len(rows), dtype=np.int64), np.diff(chosen.indptr))
    return Counts(
        torch.from_numpy(cell * matrix.shape[1] + chosen.indices).to(device),
        torch.from_numpy(chosen.data.astype(np.float32)).to(device),
        torch.from_numpy(size[rows].astype(np.float32)).to(device),
    )


def gaussian_loss(x: Tensor, mean: Tensor, log_sd: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Reconstruction loss of a Gaussian, averaged over cells.

    Without `log_sd` it is the squared error `(x − mean)²`, as in the paper's predecessor. With it, it is the negative
    log-density up to its constant, `½ ((x − mean) / sd)² + log sd`.

    Parameters
    ----------
    x, mean
        Observed and decoded expression (n_cells, n_genes).
    log_sd
        Logarithm of each gene's observation noise (n_genes,).
    reduction
        `mean` or `sum` over genes.

    Returns
    -------
    Tensor
        A scalar.
    """
    if log_sd is None:
        total = (x - mean).square().sum()
    else:
        total = 0.5 * ((x - mean) * torch.exp(-log_sd)).square().sum() + len(x) * log_sd.sum()
    return total / (x.numel() if reduction == "mean" else len(x))


def nb_loss(counts: Counts, log_mean: Tensor, log_theta: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Negative log-likelihood of counts under a negative binomial, averaged over cells.

    With mean m and inverse dispersion θ (variance m + m²/θ) and d = log m − log θ,

    `log p(k) = lgamma(k+θ) − lgamma(θ) − lgamma(k+1) + k (d − softplus(d)) − θ softplus(d)`.

    All but the last term vanish at k = 0, so they are computed on the non-zero counts only; one softplus is all that
    is done on the dense matrix.

    Parameters
    ----------
    counts
        Non-zero counts of the batch.
    log_mean
        Logarithm of the mean (n_cells, n_genes).
    log_theta
        Logarithm of the inverse dispersion of each gene (n_genes,).
    reduction
        `mean` or `sum` over genes.
    """
    n_cells, n_genes = log_mean.shape
    log_likelihood: Tensor = _NBLogLikelihood.apply(counts.position, counts.value, log_mean, log_theta)
    return -log_likelihood / (n_cells * (n_genes if reduction == "mean" else 1))


class _NBLogLikelihood(torch.autograd.Function):
    """Sum of the log-likelihood with its gradient written out.

    With σ = sigmoid(d): `∂/∂log m = k − (k + θ) σ`, and `∂/∂log θ = θ (ψ(k + θ) − ψ(θ) + σ − softplus(d)) − k (1 − σ)`.
    Derived by autograd, the picking of non-zeros would fill and add two dense matrices.
    """

    @staticmethod
    def forward(ctx: Any, position: Tensor, value: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
        odds = log_mean - log_theta
        soft = F.softplus(odds)
        theta = torch.exp(log_theta)
        gene = position % log_mean.shape[1]
        theta_at = theta[gene]
        d, s = odds.view(-1)[position], soft.view(-1)[position]
        on_nonzero = torch.lgamma(value + theta_at) - torch.lgamma(theta_at) - torch.lgamma(value + 1) + value * (d - s)
        ctx.save_for_backward(position, value, gene, theta, odds, soft)
        return on_nonzero.sum() - (soft @ theta).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, Tensor, Tensor]:
        position, value, gene, theta, odds, soft = ctx.saved_tensors
        sigma = torch.sigmoid(odds)
        left = value * (1 - sigma.view(-1)[position])
        theta_at = theta[gene]
        ones = sigma.new_ones(len(sigma))  # column sums as products, which are spread over cores in a fixed order
        of_theta = theta * (ones @ sigma - ones @ soft)
        on_nonzero = theta_at * (torch.digamma(value + theta_at) - torch.digamma(theta_at)) - left
        of_theta = of_theta.index_add(0, gene, on_nonzero)
        of_mean = sigma.mul_(-theta)
        flat = of_mean.view(-1)
        flat[position] = flat[position] + left  # positions are distinct
        return None, None, of_mean.mul_(upstream[0]), of_theta * upstream[0]


def nb_log1p_moments(
    mean: np.ndarray, theta: np.ndarray, scale: np.ndarray, *, tail: float = 1e-6, max_count: int = 5_000
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of `log(1 + scale · k)` for a negative binomial count k.

    The expectation of a logarithm is not the logarithm of the expectation, and predictions are compared with means of
    log-normalised cells. The sum over k runs until the remaining probability is below `tail`, or up to `max_count`;
    what remains is put at its conditional mean.

    Parameters
    ----------
    mean
        Means (n_cells, n_genes).
    theta
        Inverse dispersions (n_genes,).
    scale
        Factor from counts to normalised expression of each cell (n_cells,).

    Returns
    -------
    tuple of ndarray
        Mean and variance, each (n_cells, n_genes).
    """
    m = mean.astype(np.float64).ravel()
    r = np.broadcast_to(np.asarray(theta, dtype=np.float64), mean.shape).ravel()
    c = np.broadcast_to(np.asarray(scale, dtype=np.float64)[:, None], mean.shape).ravel()
    first, second = np.zeros_like(m), np.zeros_like(m)
    log_ratio, log_p = np.log(m) - np.log(m + r), -r * np.log1p(m / r)
    left, left_mean = -np.expm1(log_p), m
    active = np.arange(m.size)
    for k in range(1, max_count + 1):
        log_p = log_p + np.log((k - 1 + r) / k) + log_ratio
        p, value = np.exp(log_p), np.log1p(c * k)
        left, left_mean = left - p, left_mean - k * p
        first[active] += p * value
        second[active] += p * value**2
        keep = (left > tail) & (k < max_count)
        if not keep.all():
            done = ~keep & (left > 0)
            value = np.log1p(c[done] * np.maximum(left_mean[done], 0) / left[done])
            first[active[done]] += left[done] * value
            second[active[done]] += left[done] * value**2
            active, r, c, log_ratio, log_p, left, left_mean = (
                a[keep] for a in (active, r, c, log_ratio, log_p, left, left_mean)
            )
        if not len(active):
            break
    return first.reshape(mean.shape), (second - first**2).reshape(mean.shape)
