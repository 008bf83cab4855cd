"""Merge score tables and write the summary tables of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import StatisticsSpec
from perturbed.data.contracts import SCORE_COLUMNS, read_scores, write_scores
from perturbed.errors import ConfigError, DataError, suggest
from perturbed.evaluation.bootstrap import UNDEFINED, Estimate, estimate_mean
from perturbed.evaluation.statistics import (
    CEILINGS,
    REFERENCES,
    Contrast,
    ScoreGrid,
    arrange,
    choose_floor,
    contrast,
    direction_of,
    holm,
    normalise,
    stratify,
)
from perturbed.files import atomic

log = logging.getLogger(__name__)
KEY = ["dataset", "split", "fold", "method", "seed", "context", "perturbation", "metric"]
TABLES = ("summary", "contrasts", "strata", "undefined", "calibration", "perturbations")
"""The csv files, each described at the function that makes it."""


def summarise(
    paths: Sequence[Path], spec: StatisticsSpec, out: Path, directions: Mapping[str, int] | None = None
) -> None:
    """Write the folder `out` of summary tables: merged `scores.parquet` and one csv per name in `TABLES`.

    Equal inputs give equal bytes. The folder appears whole or not at all.

    Parameters
    ----------
    paths
        `scores.parquet` files, in any order; rows that several files share (references) must agree.
    spec
        Statistics of the run.
    out
        Folder to write; an old one is replaced.
    directions
        +1, −1 or 0 by metric; the registry's own when left out.

    Raises
    ------
    DataError
        If files contradict each other or a metric is unknown.
    ConfigError
        If the primary metric was not scored.
    """
    scores = merge_scores(paths)
    _warn_of_missing_primary(scores, spec)
    metrics = sorted(set(scores["metric"]))
    if spec.primary_metric not in metrics:
        hint = suggest(spec.primary_metric, metrics)
        raise ConfigError(f"statistics.primary_metric: {spec.primary_metric!r} was not scored; {hint}")
    directions = read_directions() if directions is None else directions
    grids = list(arrange(scores, spec))
    tables = {
        "summary": tabulate_means(grids, spec, directions),
        "contrasts": tabulate_contrasts(grids, spec, directions),
        "strata": tabulate_strata(grids, spec, directions),
        "undefined": tabulate_undefined(scores),
        "calibration": tabulate_calibration(grids, spec, directions),
        "perturbations": tabulate_perturbations(scores, spec),
    }
    with atomic(out) as part:
        part.mkdir()
        write_scores(part / "scores.parquet", scores)
        for name, table in tables.items():
            table.to_csv(part / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def _warn_of_missing_primary(scores: pd.DataFrame, spec: StatisticsSpec) -> None:
    for (dataset, split), group in scores.groupby(["dataset", "split"], sort=True):
        missing = {spec.primary_method, spec.primary_baseline} - set(group["method"])
        if missing:
            names = ", ".join(sorted(missing))
            log.warning("%s, %s: no primary contrast, because %s was not scored", dataset, split, names)


def read_directions() -> dict[str, int]:
    """Direction of every metric in the registry."""
    from perturbed.evaluation.registry import METRICS

    return {name: metric.direction for name, metric in METRICS.items()}


def merge_scores(paths: Iterable[Path]) -> pd.DataFrame:
    """Join score files into one table, sorted by its keys; rows that occur in several files stand once.

    Raises
    ------
    DataError
        If there is no row, or two files give different scores for the same key.
    """
    parts = [read_scores(path).loc[:, list(SCORE_COLUMNS)] for path in sorted(paths)]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError("scores: no score in any file; check that the evaluation wrote rows")
    merged = pd.concat(parts, ignore_index=True)
    merged["reason"] = merged["reason"].astype("string").fillna("")
    merged["context"] = merged["context"].astype("string").fillna("").astype(str)
    merged["subgroup"] = merged["subgroup"].astype("string").fillna("").astype(str)
    merged = merged.sort_values(KEY, kind="stable").drop_duplicates([*KEY, "value", "reason"], ignore_index=True)
    repeated = merged.duplicated(KEY, keep="first")
    if repeated.any():
        row = merged.iloc[int(np.argmax(repeated))]
        where = f"{row['method']} seed {row['seed']} on {row['perturbation']}, {row['metric']}"
        raise DataError(f"scores: two files disagree on {where}; delete the stale one and rerun `perturbed evaluate`")
    return merged


# --- tables -------------------------------------------------------------------------------------------------------


def tabulate_means(grids: Sequence[ScoreGrid], spec: StatisticsSpec, directions: Mapping[str, int]) -> pd.DataFrame:
    """`summary.csv`: mean of every method and reference on every metric, interval, floor, ceiling, normalised score.

    `mean`, `ci_low`, `ci_high`, `sd_over_seeds`, `floor`, `ceiling` and `truth` are on the metric's own scale, each
    over the perturbations where it is defined; `normalised…` compares on the perturbations that all three define.
    """
    rows = []
    for grid in grids:
        for metric in grid.metrics:
            direction = direction_of(metric, directions)
            floor = choose_floor(grid, metric)
            levels = {
                "floor_method": floor or "",
                "floor": _mean(grid, floor, metric, spec).value,
                "ceiling": _mean(grid, CEILINGS[0], metric, spec).value,
                "truth": _mean(grid, CEILINGS[1], metric, spec).value,
            }
            for method in (*grid.methods, *REFERENCES):
                if (method, metric) in grid.values:
                    rows.append(_summary_row(grid, method, metric, direction, levels, spec))
    return pd.DataFrame(rows)


def _mean(
    grid: ScoreGrid, method: str | None, metric: str, spec: StatisticsSpec, keep: np.ndarray | None = None
) -> Estimate:
    if method is None or (method, metric) not in grid.values:
        return UNDEFINED
    (values,) = grid.average(metric, (method,), keep)
    from perturbed.evaluation.registry import METRICS

    found = estimate_mean(grid.plan, values, names=(method, ""), confidence=spec.confidence)
    if metric not in METRICS or np.isnan(found.low):
        return found
    # Few units stretch an interval past what the metric can be; the truth is never there, so nothing is lost.
    low, high = METRICS[metric].bounds
    return replace(found, low=max(found.low, low), high=min(found.high, high))


def _summary_row(
    grid: ScoreGrid, method: str, metric: str, direction: int, levels: Mapping[str, Any], spec: StatisticsSpec
) -> dict[str, Any]:
    (values,) = grid.average(metric, (method,))
    mean = _mean(grid, method, metric, spec)
    by_seed = values[np.isfinite(values).all(axis=1)].mean(axis=0) if mean.n else np.array([])
    row = {
        **_where(grid),
        "method": method,
        "reference": method in REFERENCES,
        "metric": metric,
        "direction": direction,
        "n_perturbations": mean.n,
        "n_undefined": grid.count(metric) - mean.n,
        "n_genes": mean.n_genes,
        "n_seeds": values.shape[1],
        "mean": mean.value,
        "ci_low": mean.low,
        "ci_high": mean.high,
        "sd_over_seeds": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else np.nan,
        **levels,
    }
    notes = []
    for ceiling, column in zip(CEILINGS, ("normalised", "normalised_truth")):
        result = normalise(grid, method, metric, direction, ceiling=ceiling, confidence=spec.confidence)
        ratio = result.ratio or UNDEFINED
        row |= {column: ratio.value, f"{column}_low": ratio.low, f"{column}_high": ratio.high}
        notes += [f"{column} left out: {result.note}"] if result.note else []
    return {**row, "note": "; ".join(notes)}


def tabulate_contrasts(grids: Sequence[ScoreGrid], spec: StatisticsSpec, directions: Mapping[str, int]) -> pd.DataFrame:
    """`contrasts.csv`: every method against every named baseline on every metric; `difference` > 0: method better.

    `family` says with which other rows a p value was adjusted: `primary` (the contrast fixed in the config, one per
    dataset and split), or the baseline (methods × datasets × splits × metrics against it, without the primary).
    """
    rows = []
    for grid in grids:
        for baseline in spec.baselines:
            for method in grid.methods:
                for metric in grid.metrics:
                    if method != baseline and {(method, metric), (baseline, metric)} <= set(grid.values):
                        result = contrast(
                            grid, method, baseline, metric, direction_of(metric, directions), confidence=spec.confidence
                        )
                        rows.append(_contrast_row(grid, method, baseline, metric, result, spec, directions))
    table = pd.DataFrame(rows, columns=_CONTRAST_COLUMNS)
    table["p_holm"] = np.nan
    table["family_size"] = 0
    for _, members in table.groupby("family").groups.items():
        table.loc[members, "p_holm"] = holm(table.loc[members, "p"].to_numpy(float))
        table.loc[members, "family_size"] = int(table.loc[members, "p"].notna().sum())
    return table


_CONTRAST_COLUMNS = [
    "dataset", "split", "method", "baseline", "metric", "direction", "primary", "family",
    "n_perturbations", "n_left_out", "n_genes", "n_seeds", "n_seeds_baseline", "n_draws",
    "method_mean", "baseline_mean", "difference", "ci_low", "ci_high", "se", "p",
    "win_rate", "win_low", "win_high",
]  # fmt: skip


def _contrast_row(
    grid: ScoreGrid,
    method: str,
    baseline: str,
    metric: str,
    result: Contrast,
    spec: StatisticsSpec,
    directions: Mapping[str, int],
) -> dict[str, Any]:
    primary = (method, baseline, metric) == (spec.primary_method, spec.primary_baseline, spec.primary_metric)
    return {
        **_where(grid),
        "method": method,
        "baseline": baseline,
        "metric": metric,
        "direction": directions[metric],
        "primary": primary,
        "family": "primary" if primary else baseline,
        "n_perturbations": result.difference.n,
        "n_left_out": result.n_left_out,
        "n_genes": result.difference.n_genes,
        "n_seeds": result.n_seeds,
        "n_seeds_baseline": result.n_seeds_baseline,
        "n_draws": spec.n_bootstrap,
        "method_mean": result.method_mean,
        "baseline_mean": result.baseline_mean,
        "difference": result.difference.value,
        "ci_low": result.difference.low,
        "ci_high": result.difference.high,
        "se": result.difference.se,
        "p": result.difference.p,
        "win_rate": result.win_rate,
        "win_low": result.win_low,
        "win_high": result.win_high,
    }


def tabulate_strata(grids: Sequence[ScoreGrid], spec: StatisticsSpec, directions: Mapping[str, int]) -> pd.DataFrame:
    """`strata.csv`: means by effect size and by subgroup, and the difference to the primary baseline (> 0: better)."""
    rows = []
    for grid in grids:
        strata = list(stratify(grid, spec.n_strata))
        for kind, stratum, keep in strata:
            sizes = grid.rows.loc[keep].groupby("perturbation")["effect_size"].mean()
            for method, metric in sorted(grid.values):
                if not grid.count(metric, keep):
                    continue  # a metric of the whole test set has no strata
                mean = _mean(grid, method, metric, spec, keep)
                row = {
                    **_where(grid),
                    "kind": kind,
                    "stratum": stratum,
                    "effect_size_low": sizes.min(),
                    "effect_size_high": sizes.max(),
                    "method": method,
                    "reference": method in REFERENCES,
                    "metric": metric,
                    "direction": direction_of(metric, directions),
                    "n_perturbations": mean.n,
                    "n_undefined": grid.count(metric, keep) - mean.n,
                    "mean": mean.value,
                    "ci_low": mean.low,
                    "ci_high": mean.high,
                }
                rows.append(row | _against_primary(grid, method, metric, spec, directions, keep))
    return pd.DataFrame(rows)


def _against_primary(
    grid: ScoreGrid,
    method: str,
    metric: str,
    spec: StatisticsSpec,
    directions: Mapping[str, int],
    keep: np.ndarray,
) -> dict[str, Any]:
    baseline, found = spec.primary_baseline, UNDEFINED
    if method not in (*REFERENCES, baseline) and (baseline, metric) in grid.values:
        direction = direction_of(metric, directions)
        found = contrast(grid, method, baseline, metric, direction, confidence=spec.confidence, keep=keep).difference
    low_high = {"difference_low": found.low, "difference_high": found.high}
    return {"baseline": baseline, "difference": found.value, **low_high}


def tabulate_undefined(scores: pd.DataFrame) -> pd.DataFrame:
    """`undefined.csv`: number of undefined scores by method, metric and reason."""
    missing = scores[scores["value"].isna()]
    missing = missing.assign(reason=missing["reason"].replace("", "no reason given"))
    keys = ["dataset", "split", "method", "metric", "reason"]
    counted = missing.groupby(keys, sort=True).agg(count=("value", "size"), n_perturbations=("perturbation", "nunique"))
    return counted.reset_index()


def tabulate_calibration(
    grids: Sequence[ScoreGrid], spec: StatisticsSpec, directions: Mapping[str, int]
) -> pd.DataFrame:
    """`calibration.csv`: dynamic range fraction (positive − floor) / (perfect − floor) per dataset, split and metric.

    The positive control is a duplicate, perfect is the truth's own score. Near 1 the metric tells a good prediction
    from an uninformed one; near 0 it does not, or noise hides the difference. Not clipped.
    """
    rows = []
    for grid in grids:
        for metric in grid.metrics:
            for positive in ("interpolated_duplicate", "technical_duplicate"):
                if (positive, metric) in grid.values:
                    direction = direction_of(metric, directions)
                    drf = normalise(grid, positive, metric, direction, ceiling="truth", confidence=spec.confidence)
                    ratio, floor = drf.ratio or UNDEFINED, choose_floor(grid, metric)
                    row = {
                        **_where(grid),
                        "metric": metric,
                        "direction": direction,
                        "positive": positive,
                        "floor_method": floor or "",
                        "n_perturbations": ratio.n,
                        "floor": _mean(grid, floor, metric, spec).value,
                        "positive_value": _mean(grid, positive, metric, spec).value,
                        "perfect": _mean(grid, "truth", metric, spec).value,
                        "drf": ratio.value,
                        "drf_low": ratio.low,
                        "drf_high": ratio.high,
                    }
                    rows.append({**row, "note": drf.note})
    return pd.DataFrame(rows, columns=_CALIBRATION_COLUMNS)


_CALIBRATION_COLUMNS = [
    "dataset", "split", "metric", "direction", "positive", "floor_method", "n_perturbations", "floor",
    "positive_value", "perfect", "drf", "drf_low", "drf_high", "note",
]  # fmt: skip


def tabulate_perturbations(scores: pd.DataFrame, spec: StatisticsSpec) -> pd.DataFrame:
    """`perturbations.csv`: the primary metric per perturbation and method, averaged over folds, contexts and seeds.

    The average is over the defined scores; `n_defined` of `n_scores` says how many there were.
    """
    picked = scores[scores["metric"] == spec.primary_metric]
    keys = ["dataset", "split", "method", "metric", "perturbation"]
    table = picked.groupby(keys, sort=True).agg(
        subgroup=("subgroup", "first"),
        effect_size=("effect_size", "mean"),
        n_scores=("value", "size"),
        n_defined=("value", "count"),
        value=("value", "mean"),
    )
    return table.reset_index()


def _where(grid: ScoreGrid) -> dict[str, str]:
    return {"dataset": grid.dataset, "split": grid.split}
