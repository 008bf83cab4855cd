"""Ceilings beside the methods: duplicates of the truth, the truth itself, and the noise-free truth of a simulation.

`technical_duplicate`
    One random half of a condition's test cells predicts the other, averaged over `n_halves`. Halves are noisier than
    the whole, so the average is carried to two samples of the full n as each metric's `to_full_n` says: correlations by
    Spearman–Brown, ``2r / (1 + r)``; errors by the halved sampling variance (squared ones times ½, plain ones times
    √½); the residual share ``u = 1 − R²`` by ``2u / (4 − u)``, since the scatter of the truth loses half of that
    variance too; the disjoint-control correlation, whose controls do not grow with the cells, by taking half of the
    sampling variance ``s² = Var_g(x_A − x_B) / 2`` out of both variances,
    ``r √(v_A v_B / ((v_A − s²/2)(v_B − s²/2)))``. Ranks, differential expression, unbiased distances and the published
    cell-level numbers have no such law and stay as the halves give them.
`interpolated_duplicate`
    Per gene ``(1 − q) x_B + q m``: the duplicate half where the gene differs from the other perturbations (q is the
    adjusted p-value of Welch's test of the half against them), the training perturbed mean m where it does not. It
    predicts the other half, and is not corrected: it is an estimator of its own, and this one is conservative.
`truth`
    The condition's own mean. Perfect by definition; not 0 for the cell-level numbers, whose floor it shows.
`noise_free`, `noise_free_additive`
    In a simulation: the population mean, and the control plus the sum of the noise-free single effects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Prediction, read_prediction
from perturbed.evaluation.case import Predicted
from perturbed.evaluation.differential import welch_t
from perturbed.evaluation.loading import load_truth
from perturbed.evaluation.registry import Correction, Metric, Undefined, select_metrics
from perturbed.evaluation.scoring import Scores, align
from perturbed.evaluation.truth import Truth, generator
from perturbed.names import CONTROL, genes_of, join_genes

REFERENCES = ("technical_duplicate", "interpolated_duplicate", "truth", "noise_free", "noise_free_additive")
BY_DEFINITION = "by definition"


def score_references(
    prepared: str | Path,
    split: str | Path,
    features: str | Path | None,
    spec: EvaluationSpec,
    truth: str | Path | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The long table of scores of all references, `method` naming the reference.

    Parameters
    ----------
    prepared, split, features, spec
        As for `evaluate`.
    truth
        truth.h5ad of a simulation: one row per perturbation × context, control among them, the noise-free mean in `X`.
    meta
        `dataset`, `split`, `fold` where they should differ from what the files say.

    Raises
    ------
    ConfigError, DataError
        As `evaluate`.
    """
    metrics = select_metrics(spec.metrics)
    observed = load_truth(prepared, split, spec, features=features)
    scored = {**_duplicates(observed, metrics), "truth": _score_truth(observed, metrics)}
    if truth is not None:
        noise_free = read_prediction(truth)
        scored["noise_free"] = Scores.of(observed, align(observed, noise_free, str(truth)), metrics)
        additive = align(observed, add_singles(noise_free, observed), str(truth))
        scored["noise_free_additive"] = Scores.of(observed, additive, metrics)
    tables = [scores.table(observed, {**(meta or {}), "method": name}) for name, scores in scored.items()]
    return pd.concat(tables, ignore_index=True)


def _score_truth(truth: Truth, metrics: Sequence[Metric]) -> Scores:
    scores = Scores.of(truth, [Predicted(mean) for mean in truth.mean], metrics)
    for metric in metrics:
        if metric.topic == "Distribution" or metric.name == "mmd_published":  # cells against themselves say nothing
            enough = truth.n_cells >= max(truth.spec.min_cells, 1)
            scores.values[metric.name][enough] = metric.perfect
            scores.reasons[metric.name][:] = [
                BY_DEFINITION if ok else reason for ok, reason in zip(enough, scores.reasons[metric.name])
            ]
    return scores


# --- duplicates ---------------------------------------------------------------------------------------------------


def split_halves(truth: Truth, draw: int) -> tuple[Truth, Truth]:
    """Two disjoint random halves of the test cells of every condition, of equal size (an odd cell is left out)."""
    first, second = [], []
    for i, rows in enumerate(truth.rows):
        order = generator(truth.spec.seed, "half", str(draw), *truth.key(i)).permutation(rows)
        half = len(order) // 2
        first.append(np.sort(order[:half]))
        second.append(np.sort(order[half : 2 * half]))
    return truth.restrict(first), truth.restrict(second)


def _duplicates(truth: Truth, metrics: Sequence[Metric]) -> dict[str, Scores]:
    draws: dict[str, list[Scores]] = {"technical_duplicate": [], "interpolated_duplicate": []}
    factors = []
    for draw in range(truth.spec.n_halves):
        observed, other = split_halves(truth, draw)
        makers = {"technical_duplicate": duplicate, "interpolated_duplicate": interpolate}
        for name, maker in makers.items():
            predicted = [maker(other, i) if len(other.rows[i]) else "no cell in a half" for i in range(len(truth))]
            draws[name].append(Scores.of(observed, predicted, metrics))
        factors.append([_disjoint_factor(observed, other, i) for i in range(len(truth))])
    corrections = {metric.name: metric.to_full_n for metric in metrics}
    plain: dict[str, Correction] = dict.fromkeys(corrections, "plain")
    return {
        "technical_duplicate": _average(draws["technical_duplicate"], corrections, np.array(factors)),
        "interpolated_duplicate": _average(draws["interpolated_duplicate"], plain, np.array(factors)),
    }


def duplicate(other: Truth, index: int) -> Predicted:
    """The other half as a prediction."""
    return Predicted(other.mean[index], other.pool.cells[other.rows[index]])


def interpolate(other: Truth, index: int) -> Predicted | str:
    """The other half, drawn per gene towards the training perturbed mean by its adjusted p-value."""
    mean = other.context(index).perturbed_mean
    if mean is None:
        return "no perturbation in training"
    if other.moments[index].n < 2:
        return "fewer than 2 cells in a half"
    try:
        q = welch_t(other.moments[index], other.background(index)).adjusted
    except Undefined as reason:
        return str(reason)
    interpolated = (1 - q) * other.mean[index] + q * mean
    cells = other.pool.cells[other.rows[index]].toarray() + (interpolated - other.mean[index])
    return Predicted(interpolated, cells)


def _disjoint_factor(observed: Truth, other: Truth, index: int) -> float:
    """What carries a correlation against disjoint controls from halves to the full n; see the module."""
    shared = observed.context(index)
    if shared.control_test is None or len(observed.rows[index]) == 0:
        return float("nan")
    noise = np.var(observed.mean[index] - other.mean[index]) / 2
    a, b = np.var(observed.mean[index] - shared.control_test), np.var(other.mean[index] - shared.control)
    rest = (a - noise / 2) * (b - noise / 2)
    return float(np.sqrt(a * b / rest)) if rest > 0 else float("nan")


def carry_to_full_n(value: np.ndarray, correction: Correction) -> np.ndarray:
    """Carry scores of one half against the other to one full sample against another.

    Outside the range that sampling noise alone can explain (r below 0, R² below −1) Spearman–Brown is mirrored and R²
    stays as it is; both join on smoothly or at least without a step.
    """
    if correction == "spearman_brown":
        return 2 * value / (1 + np.abs(value))
    if correction == "half":
        return value / 2
    if correction == "root_half":
        return value * np.sqrt(0.5)
    if correction == "half_residual":
        residual = 1 - value
        return 1 - np.where(residual < 2, 2 * residual / (4 - np.minimum(residual, 2)), residual)
    return value


def _average(draws: Sequence[Scores], corrections: Mapping[str, Correction], factors: np.ndarray) -> Scores:
    """The mean over the draws in which a score exists, then carried to the full n."""
    values, reasons = {}, {}
    for name in draws[0].values:
        stacked = np.stack([scores.values[name] for scores in draws])
        if corrections[name] == "variance_components":
            stacked = stacked * factors
        defined = np.isfinite(stacked).sum(axis=0)
        total = np.where(np.isfinite(stacked), stacked, 0.0).sum(axis=0)
        mean = np.where(defined > 0, total / np.maximum(defined, 1), np.nan)
        values[name] = carry_to_full_n(mean, corrections[name])
        reasons[name] = [_reason([s.reasons[name][i] for s in draws], int(n)) for i, n in enumerate(defined)]
    sets = {}
    for key in draws[0].sets:
        found = [scores.sets[key][0] for scores in draws if np.isfinite(scores.sets[key][0])]
        reason = _reason([scores.sets[key][1] for scores in draws], len(found))
        sets[key] = (float(np.mean(found)) if found else float("nan"), reason)
    return Scores(values, reasons, sets)


def _reason(reasons: Sequence[str], n_defined: int) -> str:
    first = next((reason for reason in reasons if reason), "")
    if n_defined in (0, len(reasons)):
        return first
    return f"defined in {n_defined} of {len(reasons)} halves: {first}"


# --- noise-free ---------------------------------------------------------------------------------------------------


def add_singles(noise_free: Prediction, truth: Truth) -> Prediction:
    """Noise-free additive predictions of the test conditions: ``c + Σ_g (x_g − c)``, all terms noise-free."""
    rows = {key: i for i, key in enumerate(zip(noise_free.perturbation, noise_free.context))}
    means, keys, refused = [], [], {}
    for i in range(len(truth)):
        perturbation, context = truth.key(i)
        context = context if (CONTROL, context) in rows else "all"
        needed = [(CONTROL, context), *((join_genes([gene]), context) for gene in genes_of(perturbation))]
        missing = [name for name, _ in needed if (name, context) not in rows]
        if missing:
            refused[perturbation] = f"no noise-free {missing[0]} in {context}"
            continue
        control, *singles = (noise_free.mean[rows[key]].astype(np.float64) for key in needed)
        means.append(control + sum(single - control for single in singles))
        keys.append((perturbation, context))
    blank = np.zeros((0, len(noise_free.genes)))
    return Prediction(
        mean=np.stack(means) if means else blank,
        genes=noise_free.genes,
        perturbation=tuple(p for p, _ in keys),
        context=tuple(c for _, c in keys),
        refused=refused,
    )
