"""Bootstrap over perturbations by way of their genes, nested over training seeds.

Perturbations that share a gene are not independent, so genes are resampled, not perturbations. Every gene gets a
weight drawn from Exp(1), and a perturbation weighs the product of its genes' weights: the pigeonhole bootstrap
(Owen 2007, doi 10.1214/07-AOAS122; Owen & Eckles 2012, doi 10.1214/12-AOAS547). A product of two weights varies three
times as much as one, so the plain pigeonhole is too wide where genes matter little; the spread of its draws is
therefore set to the cluster-robust standard error of data in which units share members (Aronow, Samii & Assenova 2015,
doi 10.1093/pan/mpv018). `docs/statistics.md` gives formulas and measured coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from scipy import sparse, special

from perturbed.names import genes_of

MIN_TAIL = 10
"""Fewer draws than this beyond 0 are too few to count; the p value is then read from the t distribution."""


@dataclass(frozen=True)
class Plan:
    """One set of bootstrap draws, shared by all comparisons on the same test set.

    Parameters
    ----------
    perturbations
        The P resampled perturbations.
    weights
        Bootstrap weight of each perturbation in each draw (n_draws, P), positive, mean 1.
    members
        Numbers of a perturbation's genes (P, most genes of any), −1 where it has fewer.
    shared
        1 where two perturbations share a gene (P, P), so on the diagonal too.
    key
        Numbers that seed further draws that belong to this plan.
    """

    perturbations: tuple[str, ...]
    weights: np.ndarray
    members: np.ndarray
    shared: sparse.csr_matrix
    key: tuple[int, ...]

    def count_genes(self, defined: np.ndarray) -> int:
        """Distinct genes of the perturbations `defined` (P,)."""
        found = np.unique(self.members[defined])
        return int((found >= 0).sum())


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) with its uncertainty; NaN where it is not defined.

    Parameters
    ----------
    value, low, high
        Estimate and interval.
    se
        Standard error.
    p
        Two-sided p value of the estimate being 0.
    n, n_genes
        Perturbations it rests on, and the distinct genes in them.
    """

    value: float
    low: float
    high: float
    se: float
    p: float
    n: int
    n_genes: int


UNDEFINED = Estimate(np.nan, np.nan, np.nan, np.nan, np.nan, 0, 0)


def name_key(*names: str) -> tuple[int, ...]:
    """Numbers that stand for names in the seed of a random stream."""
    return tuple(crc32(name.encode()) for name in names)


def plan_draws(perturbations: Sequence[str], n_draws: int, key: Sequence[int]) -> Plan:
    r"""Draw the bootstrap weights of perturbations.

    :math:`w_p = \prod_{g \in p} v_g` with independent :math:`v_g \sim \mathrm{Exp}(1)` per draw and gene, so that a
    single perturbation has its gene's own weight.

    Parameters
    ----------
    perturbations
        Canonical names, each once.
    n_draws
        Number of bootstrap draws.
    key
        Seed of the stream; the same key and genes give the same weights.
    """
    members = number_genes(perturbations)
    n_genes = int(members.max(initial=-1)) + 1
    gene_weights = np.random.default_rng(list(key)).exponential(size=(n_draws, n_genes))
    weights = np.ones((n_draws, len(members)))
    for column in members.T:
        weights *= np.where(column >= 0, gene_weights[:, column], 1.0)
    rows, slots = np.nonzero(members >= 0)
    ones = (np.ones(len(rows)), (rows, members[rows, slots]))
    membership = sparse.csr_matrix(ones, shape=(len(members), n_genes))
    shared = sparse.csr_matrix(membership @ membership.T)
    shared.data[:] = 1.0
    return Plan(tuple(perturbations), weights, members, shared, tuple(key))


def number_genes(perturbations: Sequence[str]) -> np.ndarray:
    """Number the genes of perturbations in sorted order: (P, most genes of any), −1 where one has fewer."""
    genes = sorted({gene for name in perturbations for gene in genes_of(name)})
    number = {gene: j for j, gene in enumerate(genes)}
    members = np.full((len(perturbations), max((len(genes_of(name)) for name in perturbations), default=0)), -1)
    for p, name in enumerate(perturbations):
        members[p, : len(genes_of(name))] = [number[gene] for gene in genes_of(name)]
    return members


def draw_seed_shifts(n_seeds: int, n_draws: int, key: Sequence[int]) -> np.ndarray:
    r"""Shifts of the seeds' weights from 1/S when seeds are resampled with replacement (n_draws, n_seeds).

    Multiplied by :math:`\sqrt{S/(S-1)}`, because resampling S seeds gives a variance (S-1)/S too small. One seed has
    nothing to resample: zeros.
    """
    if n_seeds == 1:
        return np.zeros((n_draws, 1))
    counts = np.random.default_rng(list(key)).multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_draws)
    return (counts - 1) / n_seeds * np.sqrt(n_seeds / (n_seeds - 1))


def cluster_standard_error(influence: np.ndarray, shared: sparse.csr_matrix, n: int, n_genes: int) -> float:
    r"""Standard error of a mean of perturbations that share genes.

    :math:`V = \frac{1}{P^2} \frac{G}{G-1} \sum_{p,q:\ p \cap q \ne \emptyset} e_p e_q`, which is the dyadic
    cluster-robust variance, but never below the variance of independent perturbations
    :math:`\sum_p e_p^2 / (P (P-1))`, to which it reduces for singles.

    Parameters
    ----------
    influence
        Of each perturbation on the mean, with sum 0; 0 for those left out.
    shared
        1 where two perturbations share a gene, and on the diagonal.
    n, n_genes
        Perturbations that take part (at least 2), and their distinct genes (at least 2).
    """
    clustered = float(influence @ (shared @ influence)) / n**2 * n_genes / (n_genes - 1)
    return float(np.sqrt(max(clustered, float(influence @ influence) / (n * (n - 1)))))


def estimate_mean(
    plan: Plan,
    first: np.ndarray,
    second: np.ndarray | None = None,
    *,
    names: tuple[str, str] = ("", ""),
    confidence: float = 0.95,
) -> Estimate:
    """Mean over perturbations of `first - second`, or of `first` alone.

    Parameters
    ----------
    plan
        The draws.
    first, second
        Scores (P, n_seeds of each), rows as in the plan; a perturbation counts where all its scores are finite.
    names
        Of the two methods. A method's seeds are resampled alike wherever it appears, and independently of another's.
    confidence
        Level of the interval.
    """
    sides = [(first, 1.0, names[0])] + ([] if second is None else [(second, -1.0, names[1])])
    defined = np.all([np.isfinite(values).all(axis=1) for values, *_ in sides], axis=0)
    if not defined.any():
        return UNDEFINED
    mean = np.sum([sign * values[defined].mean(axis=1) for values, sign, _ in sides], axis=0)
    weights = plan.weights if defined.all() else plan.weights[:, defined]
    total = weights.sum(axis=1)
    seeds = np.zeros(len(total))
    for values, sign, name in sides:
        seeds += sign * _seed_draws(plan, values[defined], weights, name) / total
    estimate = float(mean.mean())
    return _finish(plan, defined, estimate, weights @ mean / total, mean - estimate, seeds, confidence)


def estimate_ratio(
    plan: Plan,
    model: np.ndarray,
    floor: np.ndarray,
    ceiling: np.ndarray,
    *,
    name: str = "",
    confidence: float = 0.95,
) -> Estimate:
    """Ratio of means (model − floor) / (ceiling − floor) over perturbations, unclipped.

    Parameters
    ----------
    plan
        The draws.
    model, floor, ceiling
        Scores (P, n_seeds of each); a perturbation counts where all are finite. Seeds of `model` are resampled.
    name
        Of the model, for its seeds.
    confidence
        Level of the interval.
    """
    defined = np.all([np.isfinite(values).all(axis=1) for values in (model, floor, ceiling)], axis=0)
    low = floor[defined].mean(axis=1)
    above, span = model[defined].mean(axis=1) - low, ceiling[defined].mean(axis=1) - low
    if not defined.any() or span.mean() == 0:
        return UNDEFINED
    weights = plan.weights if defined.all() else plan.weights[:, defined]
    total = weights @ span
    value = float(above.mean() / span.mean())
    influence = (above - value * span) / span.mean()
    seeds = _seed_draws(plan, model[defined], weights, name) / total
    return _finish(plan, defined, value, weights @ above / total, influence, seeds, confidence)


def _seed_draws(plan: Plan, values: np.ndarray, weights: np.ndarray, name: str) -> np.ndarray:
    if values.shape[1] == 1:
        return np.zeros(len(weights))
    shifts = draw_seed_shifts(values.shape[1], len(weights), (*plan.key, *name_key("seeds", name)))
    return ((weights @ values) * shifts).sum(axis=1)


def _finish(
    plan: Plan,
    defined: np.ndarray,
    value: float,
    draws: np.ndarray,
    influence: np.ndarray,
    seeds: np.ndarray,
    confidence: float,
) -> Estimate:
    """Set the draws' spread to the cluster-robust one, add the seeds' share, read interval and p value."""
    n, n_genes = int(defined.sum()), plan.count_genes(defined)
    if min(n, n_genes) < 2:
        return Estimate(value, np.nan, np.nan, np.nan, np.nan, n, n_genes)
    spread = float(draws.std())
    scale = 1.0
    if spread > 1e-12 * max(1.0, abs(value)):  # differences that are equal but for rounding have no spread to set
        everywhere = np.zeros(len(defined))
        everywhere[defined] = influence
        scale = cluster_standard_error(everywhere, plan.shared, n, n_genes) / spread
    shift = scale * (draws - value) + seeds
    df = min(n, n_genes) - 1
    half = (1 - confidence) / 2
    # Percentiles of few units are too narrow, as normal quantiles are beside Student's.
    stretch = float(special.stdtrit(df, 1 - half) / special.ndtri(1 - half))
    low, high = value + stretch * np.quantile(shift, [half, 1 - half])
    se = float(shift.std())
    return Estimate(value, float(low), float(high), se, _p_value(value, value + stretch * shift, se, df), n, n_genes)


def _p_value(value: float, draws: np.ndarray, se: float, df: int) -> float:
    """Two-sided p: twice the smaller share of draws beyond 0, with +1; from t where too few draws lie there."""
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    counted = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    if beyond >= MIN_TAIL or se == 0:
        return counted
    most = 2 * (MIN_TAIL + 1) / (len(draws) + 1)
    return float(min(most, 2 * special.stdtr(df, -abs(value) / se)))
