"""Scores of recovered latents against planted ones: matched correlation, block R², structural Hamming distance."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def absolute_correlations(true: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """|Pearson r| of every true with every estimated latent.

    Parameters
    ----------
    true, estimate
        (n_cells, n_true), (n_cells, n_estimated).

    Returns
    -------
    ndarray
        (n_true, n_estimated); 0 where one of the two is constant, for it says nothing of the other.
    """
    a, b = true - true.mean(0), estimate - estimate.mean(0)
    norms = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)[None, :]
    size = np.abs(true).max(0)[:, None] * np.abs(estimate).max(0)[None, :] * len(true)
    defined = norms > 1e-10 * size  # what rounding leaves of a constant is no spread
    return np.where(defined, np.abs(a.T @ b) / np.where(defined, norms, 1), 0.0)


def match(correlations: np.ndarray) -> np.ndarray:
    """For each true latent the estimated one, all different, with the largest sum of `correlations` (Hungarian)."""
    return np.asarray(linear_sum_assignment(-correlations)[1])


def mean_correlation(
    true: np.ndarray, estimate: np.ndarray, environment: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Mean correlation coefficient (MCC) of matched latents.

    Pooled over all cells it also rewards an estimate that knows nothing but the environment, since latents differ in
    mean between environments. Within environments, |r| is averaged over environments before one matching is made
    for all of them.

    Parameters
    ----------
    true, estimate
        (n_cells, n_true), (n_cells, n_estimated ≥ n_true).
    environment
        (n_cells,); None pools.

    Returns
    -------
    tuple
        The MCC, and the matched estimated latent of each true one.
    """
    if environment is None:
        table = absolute_correlations(true, estimate)
    else:
        parts = [environment == e for e in np.unique(environment)]
        table = np.mean([absolute_correlations(true[rows], estimate[rows]) for rows in parts], axis=0)
    matched = match(table)
    return float(table[np.arange(len(table)), matched].mean()), matched


def block_r2(true: np.ndarray, estimate: np.ndarray) -> float:
    """R² of the linear regression from an estimated to a true block, each half of the cells predicting the other.

    `1 − Σ (z − ẑ)² / Σ (z − z̄)²` of each true latent, averaged over latents and both halves.

    Parameters
    ----------
    true, estimate
        (n_cells, n_true), (n_cells, n_estimated); cells that the estimator was not trained on.
    """
    design = np.hstack([np.ones((len(true), 1)), estimate])
    half = np.arange(len(true)) < len(true) // 2
    scores = []
    for fitted, scored in ((half, ~half), (~half, half)):
        weights = np.linalg.lstsq(design[fitted], true[fitted], rcond=None)[0]
        error = np.square(true[scored] - design[scored] @ weights).sum(0)
        scores.append(1 - error / np.square(true[scored] - true[scored].mean(0)).sum(0))
    return float(np.mean(scores))


def structural_hamming_distance(true: np.ndarray, estimate: np.ndarray) -> int:
    """Edges to add, delete or reverse to turn one directed graph into the other; a reversal counts once.

    Parameters
    ----------
    true, estimate
        Adjacency (n, n), non-zero at [child, parent].
    """
    a, b = true != 0, estimate != 0
    pairs = (a != b) | (a != b).T
    return int(np.triu(pairs, 1).sum())
