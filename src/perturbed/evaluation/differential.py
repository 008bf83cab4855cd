"""Differential expression between two groups of cells, from their first two moments, all genes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse, special

_ROUNDING = 1e-12  # a variance below this share of the mean square is the rounding of its own sum


@dataclass(frozen=True)
class Moments:
    """Number of cells, sum and sum of squares per gene; groups add and subtract.

    Parameters
    ----------
    n
        Number of cells.
    total, square
        Sums over cells of the values and of their squares (n_genes,).
    """

    n: int
    total: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, cells: sparse.csr_matrix | np.ndarray) -> Moments:
        """The moments of a group of cells (n_cells, n_genes), summed in float64."""
        if not sparse.issparse(cells):
            dense = np.asarray(cells, dtype=np.float64)
            return cls(len(dense), dense.sum(axis=0), (dense**2).sum(axis=0))
        matrix = sparse.csr_matrix(cells, dtype=np.float64)
        ones = np.ones(matrix.shape[0])
        return cls(matrix.shape[0], matrix.T @ ones, matrix.power(2).T @ ones)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.square + other.square)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.total - other.total, self.square - other.square)

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean per gene (n_genes,); NaN without cells."""
        return self.total / self.n if self.n else np.full_like(self.total, np.nan)

    @cached_property
    def variance(self) -> np.ndarray:
        """Unbiased variance per gene (n_genes,); exactly 0 where all cells agree, NaN for a single cell."""
        if self.n < 2:
            return np.full_like(self.total, np.nan)
        centred = self.square - self.n * self.mean**2
        return np.where(centred <= _ROUNDING * self.square, 0.0, centred) / (self.n - 1)


def add_up(groups: Sequence[Moments]) -> Moments:
    """The moments of all cells of some groups together."""
    total = groups[0]
    for moments in groups[1:]:
        total = total + moments
    return total


@dataclass(frozen=True)
class Differential:
    """A test per gene: `effect` (difference of means), statistic `t` and its degrees of `freedom`."""

    effect: np.ndarray
    t: np.ndarray
    freedom: np.ndarray

    @cached_property
    def p(self) -> np.ndarray:
        """Two-sided p-value (n_genes,)."""
        sure = np.where(self.t == 0, 1.0, 0.0)  # where the degrees of freedom are 0/0, both groups are constant
        return np.where(np.isnan(self.freedom), sure, 2 * special.stdtr(self.freedom, -np.abs(self.t)))

    @cached_property
    def adjusted(self) -> np.ndarray:
        """Benjamini–Hochberg adjusted p-value (n_genes,)."""
        return adjust_bh(self.p)

    def ranked(self) -> np.ndarray:
        """Gene positions from most to least differential: by |t|, then |effect|, then position."""
        return np.lexsort((-np.abs(self.effect), -np.abs(self.t)))

    def significant(self, fdr: float = 0.05) -> np.ndarray:
        """Whether each gene passes the false discovery rate (n_genes,)."""
        return self.adjusted < fdr


def welch_t(group: Moments, reference: Moments) -> Differential:
    """Welch's t-test of a group of cells against a reference, for all genes at once.

    ``t = (x̄₁ − x̄₂) / √(v₁/n₁ + v₂/n₂)`` with Welch–Satterthwaite degrees of freedom. A gene that is constant and
    equal in both groups has t = 0 and p = 1; one that is constant and different has t = ±∞ and p = 0. Both groups
    need two cells.
    """
    if min(group.n, reference.n) < 2:
        raise ValueError("Welch's test needs two cells in each group")
    effect = group.mean - reference.mean
    a, b = group.variance / group.n, reference.variance / reference.n
    same = np.abs(effect) <= _ROUNDING * np.maximum(np.abs(group.mean), np.abs(reference.mean))
    effect = np.where(same, 0.0, effect)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(same, 0.0, effect / np.sqrt(a + b))
        freedom = (a + b) ** 2 / (a**2 / (group.n - 1) + b**2 / (reference.n - 1))
    return Differential(effect, t, freedom)


def adjust_bh(p: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg adjusted p-values.

    ``q_(i) = min over j ≥ i of p_(j) · m / j`` for the ordered p-values, never above 1.
    """
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty_like(scaled)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve, as a sum of steps; equal scores are one step.

    ``Σ_k (R_k − R_{k−1}) P_k`` over the distinct scores from high to low.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    precision = hits[last] / (last + 1)
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
