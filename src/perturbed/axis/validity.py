"""How far the scores of a group can be trusted: stability, permuted labels, composition, softmax, planted truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata

from perturbed.axis.axes import balanced_axis
from perturbed.axis.cells import ARMS, AxisCells
from perturbed.axis.groups import Group, comparable_kinds
from perturbed.axis.spec import AxisCase
from perturbed.gradients.agreement import cosine

N_DRAWS = 200
"""Draws of genes, and permutations, behind the interval of a recovery."""


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Quantiles of draws, NaN where there are none."""
    tail = (1 - confidence) / 2
    finite = values[np.isfinite(values)]
    return (np.nan, np.nan) if not len(finite) else tuple(np.quantile(finite, [tail, 1 - tail]))


def quantiles(draws: np.ndarray, confidence: float) -> np.ndarray:
    """The same for every row (n_rows, 2)."""
    tail = (1 - confidence) / 2
    if np.isfinite(draws).all() and draws.shape[1]:
        return np.quantile(draws, [tail, 1 - tail], axis=1).T
    return np.array([interval(row, confidence) for row in draws]).reshape(-1, 2)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (ties share their mean rank)."""
    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    length = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / length) if length > 0 else np.nan


def top_overlap(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Share of the `n` genes of largest |score| that two scores have in common."""
    first, second = (set(np.argsort(-np.abs(x), kind="stable")[:n]) for x in (a, b))
    return len(first & second) / n


def adjust_fdr(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values; NaN stay."""
    found = np.full(len(p), np.nan)
    valid = np.flatnonzero(np.isfinite(p))
    order = valid[np.argsort(p[valid], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    found[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return found


# --- stability ----------------------------------------------------------------------------------------------------


def describe_stability(group: Group, spec: AxisCase) -> list[dict[str, Any]]:
    """How much of the ranking stays when donors are resampled, or halved; one row per arm and measure."""
    rows = []
    n = min(spec.top, int(group.kept.sum()))
    first, second = (group.draws.axes[half] for half in group.draws.halves)
    together = cosine(first, second)
    if np.isfinite(together).any():
        rows.append(_stability(group, "axis", "cosine_halves", together, np.nan, spec))
    for k, arm in enumerate(ARMS):
        scores = group.scores.cosine[k][group.kept]
        chance = n / len(scores)
        own = scores[:, 0]
        drawn = [x for x in scores[:, group.draws.bootstrap].T if np.isfinite(x).all()]
        halves = [scores[:, half].T for half in group.draws.halves]
        pairs = [(a, b) for a, b in zip(*halves) if np.isfinite(a).all() and np.isfinite(b).all()]
        found = {
            "spearman_bootstrap": (np.array([spearman(own, x) for x in drawn]), 0.0),
            "top_overlap_bootstrap": (np.array([top_overlap(own, x, n) for x in drawn]), chance),
            "spearman_halves": (np.array([spearman(a, b) for a, b in pairs]), 0.0),
            "top_overlap_halves": (np.array([top_overlap(a, b, n) for a, b in pairs]), chance),
        }
        rows += [_stability(group, arm, name, values, by_chance, spec) for name, (values, by_chance) in found.items()]
    return [row | {"top": n} for row in rows]


def _stability(
    group: Group, cells: str, measure: str, values: np.ndarray, chance: float, spec: AxisCase
) -> dict[str, Any]:
    low, high = interval(values, spec.confidence)
    mean = float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
    return {
        "group": group.name, "cells": cells, "measure": measure, "mean": mean, "low": low, "high": high,
        "chance": chance, "n_draws": len(values),
    }  # fmt: skip


# --- permuted labels ----------------------------------------------------------------------------------------------


def can_permute(group: Group, spec: AxisCase) -> str:
    """Why labels cannot be permuted; empty where they can."""
    if spec.axis == "given":
        return "the axis is given, not made of labels"
    if not group.draws.permutations.mixed:
        return "no study has donors in both arms, so that arm and study cannot be told apart"
    if min((group.arm == 0).sum(), (group.arm == 1).sum()) < 2:
        return "an arm has one donor, which says nothing of the spread among donors"
    return ""


def describe_exchange(group: Group) -> str:
    """Within what donors' labels were exchanged."""
    permutations = group.draws.permutations
    if permutations.n_studies == 1:
        return "one study: labels exchanged freely"
    return f"within studies ({len(permutations.mixed)} of {permutations.n_studies} have donors in both arms)"


def reach(group: Group, k: int) -> tuple[np.ndarray, np.ndarray]:
    r"""How far the axis leads along each gene's gradient: :math:`|a| s_g = \bar u_g \cdot a`.

    Returns
    -------
    observed
        (n_genes,).
    permuted
        (n_genes, n_permutations).
    """
    length = np.linalg.norm(group.draws.axes, axis=1)
    cosines = group.scores.cosine[k]
    permuted = group.draws.permuted
    return cosines[:, 0] * length[0], cosines[:, permuted] * length[permuted].astype(np.float32)


def permutation_p(group: Group, k: int, spec: AxisCase) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p of every gene from permuted labels, of its reach and of its cosine (n_genes,); NaN if not possible.

    The cosine's own p is for the record: where most variance of the latents lies along few directions, axes of permuted
    labels lie along them too, and cosines with them are as large; only their length tells them apart.
    """
    n = len(group.kept)
    if can_permute(group, spec):
        return np.full(n, np.nan), np.full(n, np.nan)
    observed, permuted = reach(group, k)
    cosines = group.scores.cosine[k]
    exact = group.draws.permutations.exact
    both = _p(observed, permuted, exact), _p(cosines[:, 0], cosines[:, group.draws.permuted], exact)
    return tuple(np.where(group.kept, p, np.nan) for p in both)  # type: ignore[return-value]


def _p(observed: np.ndarray, permuted: np.ndarray, exact: bool) -> np.ndarray:
    """Share of permutations that are as extreme; the observed labels are among all of them, and count beside drawn."""
    limit = np.abs(observed) * (1 - 1e-5)  # the observed labels themselves must count, whatever the rounding
    at_least = np.zeros(len(observed))
    for values in permuted.T:
        at_least += np.abs(values) >= limit
    n = permuted.shape[1]
    return at_least / n if exact else (1 + at_least) / (1 + n)


def describe_permutations(group: Group, spec: AxisCase, fdr: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Observed against permuted labels: length of the axis, largest |cosine| and largest |reach| of kept genes."""
    permutations = group.draws.permutations
    shared = {
        "group": group.name,
        "n_permutations": permutations.weights.perturbed.shape[1],
        "n_possible": min(permutations.n_possible, 10**12),
        "exact": permutations.exact,
        "studies_permuted": len(permutations.mixed),
        "exchanged": describe_exchange(group),
        "note": can_permute(group, spec),
    }
    if shared["note"]:
        return [{"cells": "axis", "statistic": "length"} | shared | {"n_permutations": 0, "exchanged": ""}]
    length = np.linalg.norm(group.draws.axes, axis=1)
    found = [("axis", "length", length[:1], length[None, group.draws.permuted])]
    for k, arm in enumerate(ARMS):
        observed, permuted = reach(group, k)
        cosines = group.scores.cosine[k][group.kept]
        for name, one, drawn in (
            ("max_abs_cosine", cosines[:, 0], cosines[:, group.draws.permuted]),
            ("max_abs_reach", observed[group.kept], permuted[group.kept]),
        ):
            found.append((arm, name, np.abs(one).max(keepdims=True), np.abs(drawn).max(axis=0, keepdims=True)))
    rows = []
    for cells, name, one, drawn in found:
        high = float(np.quantile(drawn, spec.confidence))
        row = {
            "cells": cells, "statistic": name, "observed": float(one[0]), "null_median": float(np.median(drawn)),
            "null_high": high, "p": float(_p(one, drawn, permutations.exact)[0]),
        }  # fmt: skip
        if name == "max_abs_reach":
            row["n_genes_fdr"] = int((fdr[cells] <= 0.05).sum())
            row["n_genes_family"] = int((np.abs(reach(group, ARMS.index(cells))[0][group.kept]) > high).sum())
        rows.append(row | shared)
    return rows


# --- composition --------------------------------------------------------------------------------------------------


def describe_composition(cells: AxisCells, group: Group, spec: AxisCase) -> list[dict[str, Any]]:
    """Axis and scores of all cells beside those with the composition of cell types held equal, and the shares."""
    rows: list[dict[str, Any]] = []
    if spec.groups is None:
        return rows
    n = min(spec.top, int(group.kept.sum()))
    for name in sorted(set(cells.kind)):
        for k, arm in enumerate(ARMS):
            share = float((cells.kind[cells.arm == k] == name).mean())
            rows.append({"measure": "share", "weighting": "", "cells": arm, "type": name, "value": share})
    kinds = comparable_kinds(cells, spec)
    if len(kinds) < 2:
        return rows
    for weighting in ("equal", "pooled"):
        column = group.column(f"composition_{weighting}")
        balanced = balanced_axis(cells.z, cells.arm, cells.kind, kinds, weighting)
        row = {"weighting": weighting, "type": "", "n_types": len(kinds)}
        rows.append(row | {"measure": "cosine_of_axes", "cells": "axis", "value": float(cosine(group.axis, balanced))})
        for k, arm in enumerate(ARMS):
            own, other = (group.scores.cosine[k][group.kept, i] for i in (0, column))
            rows.append(row | {"measure": "spearman_of_scores", "cells": arm, "value": spearman(own, other)})
            rows.append(row | {"measure": "top_overlap", "cells": arm, "value": top_overlap(own, other, n)})
    return rows


# --- softmax ------------------------------------------------------------------------------------------------------


def describe_softmax(group: Group, effect: np.ndarray | None) -> list[dict[str, Any]]:
    """Median cosine of genes before and after softmax, which gives every gene the gradient of all others.

    Parameters
    ----------
    effect
        Planted effects (n_genes,), where they are known: genes without one must have a median near 0.
    """
    sets = {"kept": group.kept}
    if effect is not None:
        sets["kept, nothing planted"] = group.kept & (effect == 0)
    rows = []
    for k, arm in enumerate(ARMS):
        share, logits = group.scores.cosine[k][:, 0], group.logits.cosine[k][:, 0]
        for name, inside in sets.items():
            medians = [float(np.median(x[inside])) if inside.any() else np.nan for x in (share, logits)]
            rows.append(
                {
                    "group": group.name, "cells": arm, "genes": name, "n_genes": int(inside.sum()),
                    "median_share": medians[0], "median_logits": medians[1], "shift": medians[0] - medians[1],
                    "spearman": spearman(share[inside], logits[inside]) if inside.sum() > 2 else np.nan,
                }
            )  # fmt: skip
    return rows


# --- planted truth ------------------------------------------------------------------------------------------------


def recover_planted(
    group: Group, lists: Mapping[str, np.ndarray], effect: np.ndarray, spec: AxisCase
) -> list[dict[str, Any]]:
    """How well lists find planted genes among the kept: AUPRC and AUROC of |score|, and direction, with intervals.

    `auroc_direction` asks whether planted genes that rise are above those that fall. Intervals are over genes drawn
    with replacement. Permuted labels: the mean over permutations and their quantiles.

    Parameters
    ----------
    lists
        Scores (n_genes,) by name of the list.
    effect
        Planted effects (n_genes,).
    """
    rows: list[dict[str, Any]] = []
    truth = effect[group.kept]
    shared = {"group": group.name, "n_planted": int((truth != 0).sum()), "n_genes": len(truth)}
    rng = np.random.default_rng([spec.seed, 4])
    draws = [rng.integers(len(truth), size=len(truth)) for _ in range(N_DRAWS)]
    for name, score in lists.items():
        own = score[group.kept]
        drawn = [measure_recovery(own[i], truth[i]) for i in draws]
        for measure, value in measure_recovery(own, truth).items():
            low, high = interval(np.array([one[measure] for one in drawn]), spec.confidence)
            rows.append(_recovery(name, measure, value, low, high, truth, "genes") | shared)
    if can_permute(group, spec):
        return rows
    for k, arm in enumerate(ARMS):
        scores = group.scores.cosine[k][group.kept][:, group.draws.permuted]
        scores = scores[:, np.linspace(0, scores.shape[1] - 1, min(N_DRAWS, scores.shape[1])).astype(int)]
        drawn = [measure_recovery(column, truth) for column in scores.T]
        for measure in drawn[0]:
            values = np.array([one[measure] for one in drawn])
            low, high = interval(values, spec.confidence)
            name = f"gradient_{arm}, labels permuted"
            rows.append(_recovery(name, measure, float(np.nanmean(values)), low, high, truth, "permutations") | shared)
    return rows


def _recovery(
    name: str, measure: str, value: float, low: float, high: float, truth: np.ndarray, unit: str
) -> dict[str, Any]:
    chance = float((truth != 0).mean()) if measure == "auprc" else 0.5
    return {"list": name, "measure": measure, "value": value, "low": low, "high": high, "chance": chance, "unit": unit}


def measure_recovery(score: np.ndarray, effect: np.ndarray) -> dict[str, float]:
    """AUPRC and AUROC of |score| for genes with an effect, and AUROC of the score for its sign among these."""
    planted = effect != 0
    return {
        "auprc": average_precision(np.abs(score), planted),
        "auroc": area_under_roc(np.abs(score), planted),
        "auroc_direction": area_under_roc(score[planted], effect[planted] > 0),
    }


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Mean over positives of the precision at their score, ties taken together; NaN without positives."""
    if not positive.any():
        return np.nan
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.diff(score[order]) != 0, True)  # ends of runs of equal scores
    hits, called = hits[last], np.flatnonzero(last) + 1
    gained = np.diff(hits, prepend=0)
    return float((gained * hits / called).sum() / positive.sum())


def area_under_roc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than another, ties counted half; NaN where either is missing."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return np.nan
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))
