"""Apply every metric to every test condition, and lay the scores out as the long table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.data.contracts import SCORE_COLUMNS, Prediction
from perturbed.errors import DataError
from perturbed.evaluation.case import Case, Predicted
from perturbed.evaluation.registry import Metric, Undefined
from perturbed.evaluation.truth import Truth

NOT_PREDICTED = "not predicted"
WHOLE_SET = "*"
"""Perturbation name of metrics that are one number for a whole test set."""
IDENTITY = ("dataset", "split", "fold", "method", "seed")


# --- alignment ----------------------------------------------------------------------------------------------------


def align(truth: Truth, prediction: Prediction, where: str) -> list[Predicted | str]:
    """What is predicted of each test condition, genes in the order of the truth; or why nothing is.

    Raises
    ------
    DataError
        If genes are missing, the prediction was made on another split, or it names no context where there are many.
    """
    made_on = prediction.meta.get("split_sha256")
    if made_on and truth.header["split_sha256"] and made_on != truth.header["split_sha256"]:
        raise DataError(f"{where}: made by a model of another split; rerun `perturbed fit` and `perturbed predict`")
    columns = pd.Index(prediction.genes).get_indexer(pd.Index(truth.genes))
    if (columns < 0).any():
        missing = [gene for gene, column in zip(truth.genes, columns) if column < 0]
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise DataError(
            f"{where}: {len(missing)} of {len(truth.genes)} scored genes are missing ({shown}); "
            "predict them, or give a features.csv with the genes to score"
        )
    contexts = _contexts(truth, prediction, where)
    rows = {key: i for i, key in enumerate(zip(prediction.perturbation, contexts))}
    aligned: list[Predicted | str] = []
    for i in range(len(truth)):
        row = rows.get(truth.key(i))
        if row is None:
            aligned.append(prediction.refused.get(truth.key(i)[0], NOT_PREDICTED))
            continue
        cells = None if prediction.cells is None else prediction.cells[row][:, columns]
        aligned.append(Predicted(np.asarray(prediction.mean[row], dtype=np.float64)[columns], cells))
    return aligned


def _contexts(truth: Truth, prediction: Prediction, where: str) -> tuple[str, ...]:
    """The context of each row; a prediction that names none is of the only context there is."""
    if set(prediction.context) != {"all"} or "all" in truth.contexts:
        return prediction.context
    if len(truth.contexts) > 1:
        names = ", ".join(sorted(truth.contexts))
        raise DataError(f"{where}: obs['context'] is missing, and the test cells have several ({names}); name it")
    return tuple(truth.contexts) * len(prediction.context)


# --- scoring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of one prediction: values and reasons per condition and metric, and per context for set metrics."""

    values: dict[str, np.ndarray]
    reasons: dict[str, list[str]]
    sets: dict[tuple[str, str], tuple[float, str]]

    @classmethod
    def of(cls, truth: Truth, aligned: Sequence[Predicted | str], metrics: Sequence[Metric]) -> Scores:
        """Apply every metric to every test condition."""
        single = [metric for metric in metrics if metric.level != "set"]
        scores = cls({m.name: np.full(len(truth), np.nan) for m in single}, {m.name: [] for m in single}, {})
        cases: dict[str, list[Case]] = {context: [] for context in truth.contexts}
        for i, prediction in enumerate(aligned):
            refusal = _refusal(truth, i, prediction)
            case = Case(truth, i, prediction) if isinstance(prediction, Predicted) and not refusal else None
            for metric in single:
                value, reason = (np.nan, refusal) if case is None else apply_metric(metric, case)
                scores.values[metric.name][i] = value
                scores.reasons[metric.name].append(reason)
            if case is not None:  # a fresh one: what a case keeps of cells would add up over a whole test set
                cases[truth.key(i)[1]].append(Case(truth, i, case.prediction))
        for metric in metrics:
            for context, members in cases.items():
                if metric.level == "set":
                    value, reason = apply_metric(metric, members)
                    total = int((truth.conditions["context"] == context).sum())
                    partial = f"{len(members)} of {total} test perturbations scored" if len(members) < total else ""
                    scores.sets[metric.name, context] = (value, "; ".join(filter(None, (reason, partial))))
        return scores

    def table(self, truth: Truth, identity: Mapping[str, Any]) -> pd.DataFrame:
        """The long table in `SCORE_COLUMNS`."""
        keys = truth.conditions.assign(n_cells=truth.n_cells, effect_size=truth.effect_size)
        parts = [
            keys.assign(metric=name, value=values, reason=self.reasons[name]) for name, values in self.values.items()
        ]
        for (name, context), (value, reason) in self.sets.items():
            inside = (keys["context"] == context).to_numpy()
            row = {
                "perturbation": WHOLE_SET, "context": context, "subgroup": "", "effect_size": np.nan,
                "n_cells": int(truth.n_cells[inside].sum()), "metric": name, "value": value, "reason": reason,
            }  # fmt: skip
            parts.append(pd.DataFrame([row]))
        table = pd.concat(parts, ignore_index=True).assign(**identify(truth, identity))
        order = ["context", "perturbation", "metric"]
        return table[list(SCORE_COLUMNS)].sort_values(order, kind="stable").reset_index(drop=True)


def identify(truth: Truth, *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset, split, fold, method, seed` of a table: what the split says, and what later mappings say instead."""
    identity: dict[str, Any] = {key: truth.header[key] for key in ("dataset", "split", "fold")}
    identity |= {"method": "", "seed": 0}
    for values in overrides:
        unknown = set(values) - set(IDENTITY)
        if unknown:
            raise DataError(f"meta: {sorted(unknown)[0]!r} is no part of a score's identity ({', '.join(IDENTITY)})")
        identity |= values
    return {key: int(value) if key in ("fold", "seed") else str(value) for key, value in identity.items()}


def identify_prediction(prediction: Prediction, where: str) -> dict[str, Any]:
    """The part of the identity that a prediction brings; the method is its file's name if it brings none."""
    return {"method": Path(where).stem, **{k: v for k, v in prediction.meta.items() if k in IDENTITY}}


def _refusal(truth: Truth, index: int, prediction: Predicted | str) -> str:
    """Why a condition is not scored at all, or nothing."""
    n = int(truth.n_cells[index])
    if n < max(truth.spec.min_cells, 1):
        return f"{n} test cells, fewer than min_cells {truth.spec.min_cells}"
    return prediction if isinstance(prediction, str) else ""


def apply_metric(metric: Metric, subject: Case | Sequence[Case]) -> tuple[float, str]:
    """Value and reason (or note) of one metric."""
    try:
        result = metric.function(subject)
    except Undefined as reason:
        return float("nan"), str(reason)
    value, note = result if isinstance(result, tuple) else (result, "")
    if not np.isfinite(value):
        return float("nan"), note or f"{metric.name} gave {value}"
    return float(value), note
