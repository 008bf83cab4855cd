"""Score a prediction against the test cells of its split: the long table, and what the figures draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Prediction, read_prediction
from perturbed.evaluation.case import Predicted
from perturbed.evaluation.loading import load_truth
from perturbed.evaluation.registry import Metric, select_metrics
from perturbed.evaluation.scoring import Scores, align, identify, identify_prediction
from perturbed.evaluation.truth import Truth
from perturbed.files import atomic, write_text
from perturbed.names import CONTROL


def evaluate(
    prepared: str | Path,
    split: str | Path,
    prediction: str | Path | Prediction,
    spec: EvaluationSpec,
    *,
    features: str | Path | None = None,
    method: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The long table of scores of one prediction.

    Parameters
    ----------
    prepared, split, features
        The truth; without `features` all genes are scored (see `load_truth`).
    prediction
        A file or what `read_prediction` gives. Genes are matched by name; further genes and conditions are ignored.
    spec
        Which metrics, and how many cells they use.
    method
        Name of the method in the table; else the prediction's own, else the file's name.
    meta
        `dataset`, `split`, `fold`, `method`, `seed` where they should differ from what the files say.

    Returns
    -------
    pandas.DataFrame
        `SCORE_COLUMNS`; one row per test condition and metric. A score that does not exist is NaN with its reason;
        `reason` may hold a note beside a valid score too.

    Raises
    ------
    ConfigError
        If `spec.metrics` names a metric that does not exist.
    DataError
        If the files do not belong together, or the prediction lacks genes.
    """
    metrics = select_metrics(spec.metrics)
    truth = load_truth(prepared, split, spec, features=features)
    prediction, where = _read(prediction)
    named = {**(meta or {}), **({} if method is None else {"method": method})}
    return score_prediction(truth, prediction, metrics=metrics, meta=named, where=where)


def score_prediction(
    truth: Truth,
    prediction: Prediction,
    *,
    metrics: Sequence[Metric] | None = None,
    meta: Mapping[str, Any] | None = None,
    where: str = "prediction",
) -> pd.DataFrame:
    """The long table of scores, for a truth that is loaded already; see `evaluate`."""
    metrics = select_metrics(truth.spec.metrics) if metrics is None else metrics
    aligned = align(truth, prediction, where)
    return Scores.of(truth, aligned, metrics).table(truth, {**identify_prediction(prediction, where), **(meta or {})})


def evaluate_details(
    prepared: str | Path,
    split: str | Path,
    prediction: str | Path | Prediction,
    spec: EvaluationSpec,
    *,
    features: str | Path | None = None,
    meta: Mapping[str, Any] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the figures draw: PCA coordinates of condition means, and effects per gene.

    Both tables begin with `dataset, split, fold, method, seed`.

    Returns
    -------
    embedding
        `perturbation, context, kind, pc1, pc2`: observed and predicted means of the test conditions and the training
        control mean (`kind` observed, predicted, control) on the PCA of the training cells.
    deltas
        `perturbation, context, gene, observed, predicted` (float32): effects against the training control mean;
        `predicted` is NaN where the method predicts nothing.

    Raises
    ------
    DataError
        As `evaluate`.
    """
    truth = load_truth(prepared, split, spec, features=features)
    prediction, where = _read(prediction)
    return describe_prediction(truth, prediction, meta=meta, where=where)


def write_details(
    prepared: str | Path,
    split: str | Path,
    prediction: str | Path | Prediction,
    features: str | Path | None,
    folder: str | Path,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write the two tables of `evaluate_details` as `embedding.csv` and `deltas.parquet` into a folder."""
    embedding, deltas = evaluate_details(prepared, split, prediction, EvaluationSpec(), features=features, meta=meta)
    write_text(Path(folder) / "embedding.csv", embedding.to_csv(index=False, float_format="%.9g", lineterminator="\n"))
    with atomic(Path(folder) / "deltas.parquet") as part:
        deltas.to_parquet(part, index=False)


def describe_prediction(
    truth: Truth, prediction: Prediction, *, meta: Mapping[str, Any] | None = None, where: str = "prediction"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables of `evaluate_details`, for a truth that is loaded already."""
    aligned = align(truth, prediction, where)
    blank = np.full(len(truth.genes), np.nan)
    predicted = np.stack([row.mean if isinstance(row, Predicted) else blank for row in aligned])
    control = np.stack([truth.context(i).control for i in range(len(truth))])
    keys = truth.conditions[["perturbation", "context"]]
    contexts = sorted(truth.contexts)
    controls = pd.DataFrame({"perturbation": CONTROL, "context": contexts})
    blocks = [
        (keys, "observed", truth.mean),
        (keys, "predicted", predicted),
        (controls, "control", np.stack([truth.contexts[name].control for name in contexts])),
    ]
    parts = []
    for names, kind, values in blocks:
        scores = truth.pool.project(values)
        parts.append(names.assign(kind=kind, pc1=scores[:, 0], pc2=scores[:, 1]))
    embedding = pd.concat(parts, ignore_index=True).dropna(subset=["pc1"]).reset_index(drop=True)
    identity = identify(truth, identify_prediction(prediction, where), meta or {})
    for position, (name, value) in enumerate(identity.items()):
        embedding.insert(position, name, value)
    n_genes = len(truth.genes)
    deltas = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.repeat(keys["perturbation"].to_numpy(), n_genes)),
            "context": pd.Categorical(np.repeat(keys["context"].to_numpy(), n_genes)),
            "gene": pd.Categorical(np.tile(np.array(truth.genes, dtype=object), len(truth))),
            "observed": (truth.mean - control).astype(np.float32).ravel(),
            "predicted": (predicted - control).astype(np.float32).ravel(),
        }
    )
    for position, (name, value) in enumerate(identity.items()):
        column = pd.Series(value, index=deltas.index)
        deltas.insert(position, name, column.astype("category") if isinstance(value, str) else column)
    return embedding, deltas


def _read(prediction: str | Path | Prediction) -> tuple[Prediction, str]:
    if isinstance(prediction, Prediction):
        return prediction, str(prediction.meta.get("method", "prediction"))
    return read_prediction(prediction), str(prediction)
