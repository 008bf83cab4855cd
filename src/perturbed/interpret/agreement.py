"""Do two fits find the same programs? Agreement of assignments and graphs, each beside what permutation gives.

Latents come in no order and with no sign or scale, so that those of two fits are matched first: one to one, such that
the sum of absolute correlations of their effects over the perturbed genes is largest (Hungarian algorithm). Programs,
as sets of genes, are matched by their overlap. Either is done anew in every permutation, which therefore gains as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

METRICS = ("adjusted_rand", "jaccard", "effect_correlation", "edge_jaccard")
"""`adjusted_rand` of the assignments of genes to their strongest latents; `jaccard` of matched programs' members;
`effect_correlation`, mean absolute over matched latents; `edge_jaccard` of the pruned graphs, without direction."""


def match_latents(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match latents by their effects.

    Parameters
    ----------
    first, second
        Effects of the same perturbed genes (n_perturbed, n_first), (n_perturbed, n_second).

    Returns
    -------
    tuple
        Positions in `first` and in `second` of each matched pair; the shorter side is used up.
    """
    rows, columns = linear_sum_assignment(-np.abs(correlate(first, second)))
    return rows, columns


def correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of every column with every column; 0 where a column is constant."""

    def standardise(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=0)
        length = np.linalg.norm(centred, axis=0)
        return centred / np.where(length > 0, length, 1.0)

    return standardise(first).T @ standardise(second)


def assign(effects: np.ndarray) -> np.ndarray:
    """Strongest latent of each perturbed gene (n_perturbed,); the first of equals."""
    return np.abs(effects).argmax(axis=1)


def match_programs(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two assignments: programs matched one to one, such that the sum of their Jaccard indices is largest.

    Parameters
    ----------
    first, second
        Latent of each perturbed gene (n_perturbed,), in either fit.

    Returns
    -------
    float
        That sum over the number of programs of the fit that has more; 1 for the same partition.
    """
    one, two = (np.unique(labels)[:, None] == labels for labels in (first, second))
    both = one.astype(float) @ two.T
    jaccard = both / (one.sum(axis=1)[:, None] + two.sum(axis=1) - both)
    return float(jaccard[linear_sum_assignment(-jaccard)].sum() / max(jaccard.shape))


def compare(
    first: np.ndarray,
    second: np.ndarray,
    graphs: tuple[np.ndarray, np.ndarray] | None,
    n_permutations: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Agreement of two fits with its permutation null, a row per metric.

    Parameters
    ----------
    first, second
        Standardised effects of the same perturbed genes (n_perturbed, n_latents).
    graphs
        Pruned adjacency of either (n_latents, n_latents), True for an edge; None leaves the graphs out.
    n_permutations
        Permutations. For the assignments the second fit's genes are permuted, and its latents matched anew; for the
        graphs its latents are.
    rng
        Draws the permutations.

    Returns
    -------
    list of dict
        metric, value, null_mean, null_high (95 % quantile), p_value (one-sided), n (perturbed genes, or edges of both).
    """
    pairs = _agree(first, second)
    nulls = [_agree(first, second[rng.permutation(len(second))]) for _ in range(n_permutations)]
    rows = [_row(metric, pairs[metric], [null[metric] for null in nulls], len(first)) for metric in pairs]
    if graphs is not None:
        rows.append(_compare_graphs(*graphs, match_latents(first, second), n_permutations, rng))
    return rows


def _agree(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score

    one, two = assign(first), assign(second)
    rows, columns = match_latents(first, second)
    return {
        "adjusted_rand": float(adjusted_rand_score(one, two)),
        "jaccard": match_programs(one, two),
        "effect_correlation": float(np.abs(correlate(first, second))[rows, columns].mean()),
    }


def _compare_graphs(
    first: np.ndarray,
    second: np.ndarray,
    matched: tuple[np.ndarray, np.ndarray],
    n_permutations: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    rows, columns = matched
    one, two = (_undirected(graph)[np.ix_(chosen, chosen)] for graph, chosen in ((first, rows), (second, columns)))
    upper = np.triu_indices(len(rows), 1)

    def overlap(order: np.ndarray) -> float:
        a, b = one[upper], two[np.ix_(order, order)][upper]
        return float((a & b).sum() / (a | b).sum()) if (a | b).any() else float("nan")

    n_edges = int(one[upper].sum() + two[upper].sum())
    draw: Callable[[], float] = lambda: overlap(rng.permutation(len(rows)))  # noqa: E731
    return _row("edge_jaccard", overlap(np.arange(len(rows))), [draw() for _ in range(n_permutations)], n_edges)


def _undirected(graph: np.ndarray) -> np.ndarray:
    return graph | graph.T


def _row(metric: str, value: float, null: list[float], n: int) -> dict[str, Any]:
    undefined = not np.isfinite(value)
    return {
        "metric": metric,
        "value": value,
        "null_mean": float("nan") if undefined else float(np.mean(null)),
        "null_high": float("nan") if undefined else float(np.quantile(null, 0.95)),
        "p_value": float("nan") if undefined else (1 + sum(draw >= value - 1e-12 for draw in null)) / (1 + len(null)),
        "n": n,
    }
