"""Tables of the studies that are made from scores: comparison, conditions, sweep and denoising.

They use the arrangement, the intervals and the paired differences of the benchmark (`statistics`, `summarise`), on the
scores of the study's own fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import StatisticsSpec
from perturbed.data.contracts import read_features
from perturbed.errors import ConfigError, DataError, suggest
from perturbed.evaluation.statistics import REFERENCES, ScoreGrid, arrange, contrast
from perturbed.evaluation.summarise import merge_scores, read_directions, tabulate_means
from perturbed.study_config import TOP_EXPRESSED, Comparison, Conditions, Denoising, Study, Sweep

PUBLISHED_COLUMNS = ("item", "method", "split", "metric", "value", "sd", "source")
_MEANS = [
    "dataset", "split", "method", "reference", "metric", "direction", "n_perturbations", "n_undefined", "n_seeds",
    "mean", "ci_low", "ci_high", "sd_over_seeds", "floor_method", "floor", "ceiling", "truth",
]  # fmt: skip


@dataclass(frozen=True)
class StudyInputs:
    """Files a table may read besides the scores; each study names those it needs.

    Parameters
    ----------
    histories
        `training.csv` files.
    probe
        Table of a probe study.
    published
        csv of published numbers.
    details
        Pairs of a `details` folder and the `features.csv` of its fold, flat.
    """

    histories: Sequence[Path] = ()
    probe: Path | None = None
    published: Path | None = None
    details: Sequence[Path] = field(default=())


def tabulate_study(
    paths: Sequence[Path], study: Study, spec: StatisticsSpec, inputs: StudyInputs | None = None
) -> pd.DataFrame:
    """The table of a study from scores; its columns are described at the function of its kind.

    Raises
    ------
    ConfigError
        If the kind of study has no table of scores, or a metric of it was not scored.
    DataError
        If files contradict each other or cannot be read.
    """
    inputs = inputs or StudyInputs()
    if study.kind not in _KINDS:
        raise ConfigError(f"study: kind {study.kind!r} is made from no scores; use one of {', '.join(_KINDS)}")
    scores = merge_scores(paths)
    if isinstance(study, Comparison) and study.top_expressed is not None:
        scores = pd.concat([scores, score_top_expressed(inputs.details, study.top_expressed, scores)])
    wanted = (study.x, study.y) if isinstance(study, Conditions) else getattr(study, "metrics", ())
    for metric in wanted:
        if metric not in set(scores["metric"]):
            raise ConfigError(f"study: metric {metric!r} was not scored; {suggest(metric, set(scores['metric']))}")
    return _KINDS[study.kind](scores, study, spec, inputs)


# --- comparison ---------------------------------------------------------------------------------------------------


def tabulate_comparison(
    scores: pd.DataFrame, study: Comparison, spec: StatisticsSpec, inputs: StudyInputs
) -> pd.DataFrame:
    """One row per dataset, split, method or reference, and metric.

    `mean` is over test perturbations with its bootstrap interval; `sd_over_seeds` is the papers' ±; `floor`, `ceiling`
    and `truth` are as in `summary.csv`; `published`, `published_sd` and `source` are a paper's, on its own data.
    """
    extra = () if study.top_expressed is None else (TOP_EXPRESSED,)
    table = _means(scores, (*study.metrics, *extra), spec)
    table = table[table["method"].isin([*study.methods, *REFERENCES])]
    return _add_published(table, table["method"], study, inputs.published).reset_index(drop=True)


def _means(scores: pd.DataFrame, metrics: Sequence[str], spec: StatisticsSpec) -> pd.DataFrame:
    directions = {**read_directions(), TOP_EXPRESSED: 1}
    picked = scores[scores["metric"].isin(metrics)]
    table = tabulate_means(list(arrange(picked, spec)), spec, directions)
    order = {metric: place for place, metric in enumerate(metrics)}
    keys = table.assign(_metric=table["metric"].map(order))
    keys = keys.sort_values(["dataset", "split", "_metric", "reference", "method"], kind="stable")
    return table.loc[keys.index, _MEANS]


def _add_published(table: pd.DataFrame, names: pd.Series, study: Study, path: Path | None) -> pd.DataFrame:
    """Add a paper's numbers by method (or level), split and metric; empty where it has none."""
    blank = table.assign(published=np.nan, published_sd=np.nan, source="")
    if path is None:
        return blank
    known = read_published(path)
    known = known[known["item"].isin(study.answers)].drop_duplicates(["method", "split", "metric"])
    keys = pd.MultiIndex.from_arrays([names.astype(str), table["split"], table["metric"]])
    found = known.set_index(["method", "split", "metric"]).reindex(keys)
    columns = {"published": "value", "published_sd": "sd", "source": "source"}
    return blank.assign(**{ours: found[theirs].to_numpy() for ours, theirs in columns.items()}).fillna({"source": ""})


def read_published(path: Path) -> pd.DataFrame:
    """Read published numbers: `item, method, split, metric, value, sd, source`, lines with # are comments.

    `method` may hold several names with | between them, for numbers that stand for each.

    Raises
    ------
    DataError
        If the file cannot be read or a column is missing.
    """
    try:
        table = pd.read_csv(path, comment="#", dtype={"method": str, "source": str})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable csv ({' '.join(str(error).split())[:120]})") from None
    missing = [column for column in PUBLISHED_COLUMNS if column not in table]
    if missing:
        raise DataError(f"{path}: column {missing[0]!r} is missing; needed are {', '.join(PUBLISHED_COLUMNS)}")
    return table.assign(method=table["method"].str.split("|")).explode("method", ignore_index=True)


def score_top_expressed(details: Sequence[Path], n_genes: int, scores: pd.DataFrame) -> pd.DataFrame:
    """Scores `pearson_delta_ctrl_top_expressed` of every fit whose effects per gene are given.

    The genes are the `n_genes` of highest mean in the training cells (`features.csv`), so no test cell chooses them.
    Scores carry subgroup, number of cells and effect size of the same condition in `scores`.

    Raises
    ------
    DataError
        If a file is missing.
    """
    keys = ["dataset", "split", "fold", "method", "seed", "context", "perturbation"]
    rows = []
    for folder, features in zip(details[::2], details[1::2], strict=True):
        try:
            deltas = pd.read_parquet(folder / "deltas.parquet")
        except OSError as error:
            raise DataError(f"{folder}: no readable deltas.parquet ({error}); rerun `perturbed evaluate`") from None
        table = read_features(features).table
        genes = set(table["mean"].sort_values(ascending=False, kind="stable").index[:n_genes])
        deltas = deltas[deltas["gene"].isin(genes)]
        for key, group in deltas.groupby(keys, observed=True, sort=True):
            observed, predicted = group["observed"].to_numpy(float), group["predicted"].to_numpy(float)
            flat = not (observed.std() > 0 and predicted.std() > 0)
            rows.append((*key, np.nan if flat else float(np.corrcoef(observed, predicted)[0, 1])))
    made = pd.DataFrame(rows, columns=[*keys, "value"])
    made["metric"], made["reason"] = TOP_EXPRESSED, np.where(made["value"].isna(), "no predicted effect", "")
    described = scores.drop_duplicates(keys)[[*keys, "subgroup", "n_cells", "effect_size"]]
    return made.merge(described, on=keys, how="inner")


# --- conditions ---------------------------------------------------------------------------------------------------


def tabulate_conditions(
    scores: pd.DataFrame, study: Conditions, spec: StatisticsSpec, inputs: StudyInputs
) -> pd.DataFrame:
    """One row per dataset, split, method and test perturbation: both metrics as columns `x` and `y`.

    Each is the mean over folds, contexts and seeds; `subgroup` and `effect_size` describe the perturbation.
    """
    picked = scores[scores["method"].isin(study.methods)]
    keys = ["dataset", "split", "method", "perturbation"]
    wide: list[pd.DataFrame | pd.Series] = [
        picked[picked["metric"] == metric].groupby(keys, sort=True)["value"].mean().rename(axis)
        for axis, metric in (("x", study.x), ("y", study.y))
    ]
    described = picked.groupby(keys, sort=True).agg(subgroup=("subgroup", "first"), effect_size=("effect_size", "mean"))
    table = described.join(wide, how="inner").reset_index()
    return table.assign(x_metric=study.x, y_metric=study.y)


# --- sweep --------------------------------------------------------------------------------------------------------


def tabulate_sweep(scores: pd.DataFrame, study: Sweep, spec: StatisticsSpec, inputs: StudyInputs) -> pd.DataFrame:
    """One row per dataset, split, level (empty: a baseline or reference) and quantity.

    `quantity` says where a row is from: `score` (interval of the bootstrap over genes and seeds), `history` (the last
    value of a term in training, folds averaged) or `probe`; for the last two, `ci_low` and `ci_high` are the range over
    seeds.
    """
    table = _means(scores, study.metrics, spec)
    table = table[table["method"].isin([*study.levels, *study.baselines, *REFERENCES])].assign(quantity="score")
    blocks = [table]
    if study.history:
        blocks.append(_last_of_history(inputs.histories, study))
    if inputs.probe is not None:
        blocks.append(_probe_accuracy(inputs.probe, study))
    joined = pd.concat(blocks, ignore_index=True)
    joined["reference"] = joined["reference"].astype("boolean").fillna(False).astype(bool)
    level = joined["method"].map({name: str(value) for name, value in study.levels.items()}).fillna("")
    order = joined["method"].map({name: place for place, name in enumerate(study.levels)})
    joined = joined.assign(level=level, order=order, factor=study.factor)
    return _add_published(joined, joined["level"], study, inputs.published)


def _last_of_history(paths: Iterable[Path], study: Sweep) -> pd.DataFrame:
    tables = [pd.read_csv(path) for path in paths]
    history = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["term"])
    unknown = set(study.history) - set(history["term"])
    if unknown:
        name = sorted(unknown)[0]
        raise ConfigError(f"study: no term {name!r} in the training histories; {suggest(name, set(history['term']))}")
    history = history[history["term"].isin(study.history)].sort_values("epoch")
    fits = ["dataset", "split", "method", "term", "seed", "fold"]
    last = history.groupby(fits, sort=True)["value"].last()
    over_folds = last.groupby(["dataset", "split", "method", "term", "seed"], sort=True).mean()
    return _over_seeds(over_folds, "history")


def _probe_accuracy(path: Path, study: Sweep) -> pd.DataFrame:
    """Balanced accuracy of the probe of z_ι; `floor` is what permuted labels give."""
    table = pd.read_csv(path)
    kept = table["method"].isin(study.levels) & (table["metric"] == "balanced_accuracy") & ~table["reduced"]
    table = table[kept & table["representation"].str.endswith("z_iota")].assign(term="balanced_accuracy")
    keys = ["dataset", "split", "method", "term"]
    found = _over_seeds(table.set_index([*keys, "seed"])["value"], "probe")
    chance = table.groupby(keys, sort=True)["chance"].mean()
    return found.assign(floor=chance.to_numpy())


def _over_seeds(values: pd.Series, quantity: str) -> pd.DataFrame:
    """Mean and range over seeds: with few of them, an interval would say more of Student than of the fits."""
    keys = ["dataset", "split", "method", "term"]
    table = values.groupby(keys, sort=True).agg(["mean", "min", "max", "std", "count"]).reset_index()
    names = {"term": "metric", "min": "ci_low", "max": "ci_high", "std": "sd_over_seeds", "count": "n_seeds"}
    return table.rename(columns=names).assign(quantity=quantity, direction=np.nan)


# --- denoising ----------------------------------------------------------------------------------------------------


def tabulate_denoising(
    scores: pd.DataFrame, study: Denoising, spec: StatisticsSpec, inputs: StudyInputs
) -> pd.DataFrame:
    """One row per dataset, split (cells per condition), method or reference, metric and baseline: the gain over it.

    `gain` is the paired mean over test perturbations, oriented so that more is better, with its bootstrap interval.
    `baseline` is the study's; where the reference is scored, each method's gain over the reference follows, and that of
    the study's baseline.
    """
    directions: Mapping[str, int] = read_directions()
    picked = scores[scores["metric"].isin(study.metrics)]
    pairs = [(name, study.baseline) for name in (*study.methods, study.reference)]
    pairs += [(name, study.reference) for name in (*study.methods, study.baseline)]
    rows = []
    for grid in arrange(picked, spec):
        for metric in study.metrics:
            for name, baseline in dict.fromkeys(pairs):
                if name != baseline and {(name, metric), (baseline, metric)} <= set(grid.values):
                    gain = _gain(grid, name, baseline, metric, directions[metric], spec.confidence)
                    rows.append({**gain, "cells": study.levels[grid.split]})
    if not rows:
        raise DataError(f"study: no method was scored beside {study.baseline} in {', '.join(study.levels)}")
    rows.sort(
        key=lambda row: (row["dataset"], row["metric"], row["baseline"] != study.baseline, row["method"], row["cells"])
    )
    return pd.DataFrame(rows, columns=_GAINS)


_GAINS = ["dataset", "split", "cells", "method", "reference", "baseline", "metric", "direction", "gain", "ci_low",
          "ci_high", "method_mean", "baseline_mean", "n_perturbations", "n_seeds"]  # fmt: skip


def _gain(
    grid: ScoreGrid, method: str, baseline: str, metric: str, direction: int, confidence: float
) -> dict[str, Any]:
    found = contrast(grid, method, baseline, metric, direction, confidence=confidence)
    return {
        "dataset": grid.dataset,
        "split": grid.split,
        "method": method,
        "reference": method in REFERENCES,
        "baseline": baseline,
        "metric": metric,
        "direction": direction,
        "gain": found.difference.value,
        "ci_low": found.difference.low,
        "ci_high": found.difference.high,
        "method_mean": found.method_mean,
        "baseline_mean": found.baseline_mean,
        "n_perturbations": found.difference.n,
        "n_seeds": found.n_seeds,
    }


_KINDS: dict[str, Callable[..., pd.DataFrame]] = {
    "comparison": tabulate_comparison,
    "conditions": tabulate_conditions,
    "sweep": tabulate_sweep,
    "denoising": tabulate_denoising,
}
