"""Comparisons of methods: paired differences with intervals, win rates, Holm, strata and normalised scores.

The unit is the perturbation. Rows of the same perturbation (contexts, folds) are averaged first, and only rows in
which every method of a comparison is defined for every one of its seeds take part. `docs/statistics.md` says what the
intervals mean and what they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special

from perturbed.config import StatisticsSpec
from perturbed.errors import DataError
from perturbed.evaluation.bootstrap import Estimate, Plan, estimate_mean, estimate_ratio, name_key, plan_draws

REFERENCES = ("technical_duplicate", "interpolated_duplicate", "truth", "noise_free", "noise_free_additive")
"""Pseudo-methods scored beside the methods: ceilings, never contestants."""
FLOORS = ("mean_effect", "no_change")
"""The floor of a metric is the first of these with a defined score for at least half of the perturbations."""
CEILINGS = ("technical_duplicate", "truth")
"""What a normalised score may be normalised to."""
ROW = ["perturbation", "fold", "context"]


@dataclass(frozen=True)
class ScoreGrid:
    """The scores of one dataset and split, arranged for comparisons.

    Parameters
    ----------
    dataset, split
        Names.
    rows
        One row per perturbation × fold × context, sorted: these three, `subgroup` and `effect_size`.
    values
        Scores (n_rows, n_seeds) by (method, metric), NaN where undefined.
    scored
        Rows that stand in the table for a metric, with a score or a reason for none (n_rows,), by metric. A metric of
        the whole test set has rows of its own.
    plan
        The bootstrap draws over the perturbations of the rows.
    """

    dataset: str
    split: str
    rows: pd.DataFrame
    values: Mapping[tuple[str, str], np.ndarray]
    scored: Mapping[str, np.ndarray]
    plan: Plan

    @property
    def methods(self) -> tuple[str, ...]:
        """Contestants, sorted; references are left out."""
        return tuple(sorted({method for method, _ in self.values} - set(REFERENCES)))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics, sorted."""
        return tuple(sorted({metric for _, metric in self.values}))

    def count(self, metric: str, keep: np.ndarray | None = None) -> int:
        """Number of perturbations scored on a metric, defined or not, within the rows `keep`."""
        scored = self.scored[metric] if keep is None else self.scored[metric] & keep
        return len(np.unique(self.codes[scored]))

    @cached_property
    def codes(self) -> np.ndarray:
        """Position of each row's perturbation in the plan (n_rows,)."""
        return np.searchsorted(self.plan.perturbations, self.rows["perturbation"].to_numpy(str))

    def average(self, metric: str, methods: Sequence[str], keep: np.ndarray | None = None) -> list[np.ndarray]:
        """Scores of methods (P, n_seeds of each) on the rows that all of them define, averaged within perturbations.

        Parameters
        ----------
        metric
            Name.
        methods
            Names; the scores come in this order.
        keep
            Restrict to these rows (n_rows,).
        """
        return _average(self, [self.values[method, metric] for method in methods], keep)


def arrange(scores: pd.DataFrame, spec: StatisticsSpec) -> Iterator[ScoreGrid]:
    """Arrange the long table of scores, one grid per dataset and split, with its bootstrap draws."""
    for (dataset, split), group in scores.groupby(["dataset", "split"], sort=True):
        described = group.groupby(ROW, sort=True).agg(
            subgroup=("subgroup", "first"), effect_size=("effect_size", "mean")
        )
        rows = described.reset_index()
        position = pd.Series(np.arange(len(rows)), index=described.index)
        at = position.loc[pd.MultiIndex.from_frame(group[ROW])].to_numpy()
        values, scored = {}, {}
        for name, picked in group.assign(_at=at).groupby("metric", sort=True):
            scored[str(name)] = np.isin(np.arange(len(rows)), picked["_at"])
        for (method, metric), picked in group.assign(_at=at).groupby(["method", "metric"], sort=True):
            seeds = np.sort(picked["seed"].unique())
            block = np.full((len(rows), len(seeds)), np.nan)
            block[picked["_at"], np.searchsorted(seeds, picked["seed"])] = picked["value"]
            values[str(method), str(metric)] = block
        perturbations = tuple(sorted(rows["perturbation"].unique()))
        key = (spec.seed, *name_key(str(dataset), str(split)))
        plan = plan_draws(perturbations, spec.n_bootstrap, key)
        yield ScoreGrid(str(dataset), str(split), rows, values, scored, plan)


def _average(grid: ScoreGrid, blocks: Sequence[np.ndarray], keep: np.ndarray | None) -> list[np.ndarray]:
    defined = np.all([np.isfinite(block).all(axis=1) for block in blocks], axis=0)
    if keep is not None:
        defined &= keep
    if len(defined) == len(grid.plan.perturbations):  # one row each: nothing to average
        return [np.where(defined[:, None], block, np.nan) for block in blocks]
    starts = np.flatnonzero(np.diff(grid.codes, prepend=-1))
    count = np.add.reduceat(defined.astype(float), starts)[:, None]
    totals = [np.add.reduceat(np.where(defined[:, None], block, 0.0), starts) for block in blocks]
    return [np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0) for total in totals]


def orient(values: np.ndarray, direction: int) -> np.ndarray:
    """Turn scores so that more is better: x (direction +1), −x (−1), −|x − 1| (0: best at 1)."""
    return -np.abs(values - 1) if direction == 0 else direction * values


def direction_of(metric: str, directions: Mapping[str, int]) -> int:
    """Direction of a metric.

    Raises
    ------
    DataError
        If it is not known.
    """
    if metric not in directions:
        raise DataError(f"scores: the direction of metric {metric!r} is unknown; add it to the registry of metrics")
    return directions[metric]


# --- contrasts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """A method against a baseline on one metric.

    Parameters
    ----------
    difference
        Mean over perturbations of method − baseline, both oriented by `orient`: positive where the method is better.
    method_mean, baseline_mean
        Means on the metric's own scale over the same perturbations.
    n_left_out
        Perturbations scored at all that miss one of the two scores.
    win_rate, win_low, win_high
        Share of perturbations on which the method is better (ties count half) and its Wilson interval.
    n_seeds, n_seeds_baseline
        Training seeds of each.
    """

    difference: Estimate
    method_mean: float
    baseline_mean: float
    n_left_out: int
    win_rate: float
    win_low: float
    win_high: float
    n_seeds: int
    n_seeds_baseline: int


def contrast(
    grid: ScoreGrid,
    method: str,
    baseline: str,
    metric: str,
    direction: int,
    *,
    confidence: float = 0.95,
    keep: np.ndarray | None = None,
) -> Contrast:
    """Compare a method with a baseline, paired over perturbations.

    Parameters
    ----------
    grid
        Scores of one dataset and split.
    method, baseline, metric
        Names.
    direction
        +1 higher is better, −1 lower is better, 0 best at 1.
    confidence
        Level of the intervals.
    keep
        Restrict to these rows of the grid.
    """
    raw = grid.average(metric, (method, baseline), keep)
    blocks = [orient(grid.values[name, metric], direction) for name in (method, baseline)]
    first, second = _average(grid, blocks, keep)
    difference = estimate_mean(grid.plan, first, second, names=(method, baseline), confidence=confidence)
    defined = np.isfinite(first).all(axis=1)
    gain = first[defined].mean(axis=1) - second[defined].mean(axis=1)
    rate = float(((gain > 0) + 0.5 * (gain == 0)).mean()) if defined.any() else np.nan
    low, high = wilson(rate, effective_number(grid.plan, defined), confidence)
    return Contrast(
        difference=difference,
        method_mean=float(raw[0][defined].mean()) if defined.any() else np.nan,
        baseline_mean=float(raw[1][defined].mean()) if defined.any() else np.nan,
        n_left_out=grid.count(metric, keep) - int(defined.sum()),
        win_rate=rate,
        win_low=low,
        win_high=high,
        n_seeds=first.shape[1],
        n_seeds_baseline=second.shape[1],
    )


def effective_number(plan: Plan, defined: np.ndarray) -> float:
    r"""How many independent perturbations those that share genes are worth.

    :math:`n^2 / \sum_{p,q} |p \cap q| / \sqrt{|p| |q|}`: the design effect if all of a perturbation's score came from
    its genes. It is n for singles.
    """
    members = plan.members[defined]
    held = members >= 0
    size = np.sqrt(held.sum(axis=1))
    # The sum over pairs is, gene by gene, the square of the sum over the perturbations that hold it.
    by_gene = np.bincount(members[held], weights=np.repeat(1 / size, held.sum(axis=1))) if len(size) else np.zeros(1)
    overlap = float((by_gene**2).sum())
    return len(size) ** 2 / overlap if overlap else 0.0


def wilson(rate: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion out of `n` (which need not be whole); NaN for no data."""
    if not n > 0 or np.isnan(rate):
        return np.nan, np.nan
    z = float(special.ndtri(0.5 + confidence / 2))
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 and 1 rounding may put a limit an ulp outside.
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p values; NaN stays NaN and is no member of the family."""
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


# --- floors, ceilings and normalised scores -----------------------------------------------------------------------


def choose_floor(grid: ScoreGrid, metric: str) -> str | None:
    """The floor of a metric: the first of `FLOORS` that scores at least half of the perturbations, or None."""
    for name in FLOORS:
        block = grid.values.get((name, metric))
        if block is not None:
            defined = len(np.unique(grid.codes[np.isfinite(block).all(axis=1)]))
            if 2 * defined >= grid.count(metric):
                return name
    return None


@dataclass(frozen=True)
class Normalised:
    """A score between floor and ceiling, unclipped: 0 is the floor, 1 the ceiling; `note` says why there is none."""

    ratio: Estimate | None
    note: str = ""


def normalise(
    grid: ScoreGrid,
    method: str,
    metric: str,
    direction: int,
    *,
    ceiling: str = CEILINGS[0],
    confidence: float = 0.95,
) -> Normalised:
    """Normalised score (method − floor) / (ceiling − floor) over the perturbations that all three define.

    Left out, with a note, where the interval of ceiling − floor does not lie above 0: the metric then cannot tell a
    perfect prediction from an uninformed one on these data, and the ratio means nothing.
    """
    floor = choose_floor(grid, metric)
    if floor is None:
        return Normalised(None, "no floor is defined")
    if (ceiling, metric) not in grid.values:
        return Normalised(None, f"{ceiling} was not scored")
    names = (method, floor, ceiling)
    model, low, top = _average(grid, [orient(grid.values[name, metric], direction) for name in names], None)
    span = estimate_mean(grid.plan, top, low, names=(ceiling, floor), confidence=confidence)
    if span.n == 0:
        return Normalised(None, f"no perturbation defines this method, {floor} and {ceiling}")
    if not span.low > 0:
        interval = f"{span.value:.3g} [{span.low:.3g}, {span.high:.3g}]"
        return Normalised(None, f"{ceiling} − {floor} is not clear of 0: {interval}")
    return Normalised(estimate_ratio(grid.plan, model, low, top, name=method, confidence=confidence))


# --- strata -------------------------------------------------------------------------------------------------------


def stratify(grid: ScoreGrid, n_strata: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Strata of the rows: kind (`effect_size` or `subgroup`), name, and the rows in it.

    Effect-size strata hold equal numbers of perturbations by rank of their mean effect size; stratum 1 is the weakest.
    """
    size = grid.rows.groupby("perturbation")["effect_size"].mean().dropna()
    rank = size.rank(method="first").sub(1)
    stratum = (rank * n_strata // max(len(size), 1)).astype(int) + 1
    of_row = grid.rows["perturbation"].map(stratum).to_numpy()
    for number in range(1, n_strata + 1):
        keep = of_row == number
        if keep.any():
            yield "effect_size", str(number), keep
    for subgroup in sorted(set(grid.rows["subgroup"].dropna()) - {""}):
        yield "subgroup", str(subgroup), (grid.rows["subgroup"] == subgroup).to_numpy()
