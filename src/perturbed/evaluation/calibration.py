"""Which metrics can tell a good prediction from an uninformed one on these data; ask before judging any method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from perturbed.evaluation.registry import METRICS

NEGATIVES = ("mean_effect", "no_change")
POSITIVES = ("interpolated_duplicate", "technical_duplicate")


def calibrate(
    scores: pd.DataFrame, *, negatives: Sequence[str] = NEGATIVES, positives: Sequence[str] = POSITIVES
) -> pd.DataFrame:
    """Dynamic range fraction per dataset, split, metric and positive control.

    ``DRF = (M_positive − M_negative) / (M_perfect − M_negative)`` of the mean scores over the perturbations on which
    all three exist; unclipped. About 1: the metric sees what can be seen. About 0 or below: a duplicate of the truth
    scores no better than the negative control, and the metric should not be the primary one here.

    Parameters
    ----------
    scores
        A long table (`SCORE_COLUMNS`) that holds the negative controls' and the references' scores.
    negatives
        Uninformed methods; the first that has the metric defined is taken (mean_effect has no Pearson-Δ against the
        perturbed mean, no_change none against the control).
    positives
        Duplicates of the truth.

    Returns
    -------
    pandas.DataFrame
        `dataset, split, metric, negative, positive, n, m_negative, m_positive, m_perfect, drf, reason`.

    Notes
    -----
    Miller et al. 2025 (cellsimbench), there clipped to [−1, 1].
    """
    rows = []
    for (dataset, split, name), part in scores.groupby(["dataset", "split", "metric"], sort=True):
        wide = part.pivot_table(
            index=["fold", "context", "perturbation"], columns="method", values="value", aggfunc="mean", dropna=False
        )
        for positive in positives:
            row = _calibrate_one(wide, str(name), negatives, positive)
            rows.append({"dataset": dataset, "split": split, "metric": name, "positive": positive, **row})
    columns = [
        "dataset", "split", "metric", "negative", "positive", "n", "m_negative", "m_positive", "m_perfect", "drf",
        "reason",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _calibrate_one(wide: pd.DataFrame, name: str, negatives: Sequence[str], positive: str) -> dict[str, object]:
    blank = {"negative": "", "n": 0, "m_negative": np.nan, "m_positive": np.nan, "m_perfect": np.nan, "drf": np.nan}
    defined = [m for m in negatives if m in wide and wide[m].notna().any()]
    if not defined:
        return {**blank, "reason": f"undefined for {' and '.join(negatives)}"}
    if positive not in wide or wide[positive].isna().all():
        return {**blank, "negative": defined[0], "reason": f"undefined for {positive}"}
    perfect = wide["truth"] if "truth" in wide else pd.Series(METRICS[name].perfect, index=wide.index)
    both = pd.DataFrame({"negative": wide[defined[0]], "positive": wide[positive], "perfect": perfect}).dropna()
    if both.empty:
        return {**blank, "negative": defined[0], "reason": "no perturbation on which all three are defined"}
    low, high, best = (float(both[key].mean()) for key in ("negative", "positive", "perfect"))
    row = {**blank, "negative": defined[0], "n": len(both), "m_negative": low, "m_positive": high, "m_perfect": best}
    if best == low:
        return {**row, "reason": "the negative control is perfect"}
    return {**row, "drf": (high - low) / (best - low), "reason": ""}
