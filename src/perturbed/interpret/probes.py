"""Linear probes: how much of the condition can be read from a representation that never saw it.

Every representation is frozen before the probe sees it, and the probed cells are test cells of the split on which the
encoders were trained, so that none of them was seen by an encoder.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.contracts import Features, open_prepared, read_features, read_split
from perturbed.data.matrices import read_rows
from perturbed.errors import DataError, LeakageError
from perturbed.files import atomic
from perturbed.interpret.spec import ProbeSpec
from perturbed.names import CONTROL

log = logging.getLogger(__name__)

COLUMNS = (
    "dataset", "split", "fold", "method", "representation", "seed", "n_dimensions", "reduced", "n_conditions",
    "n_cells", "metric", "value", "chance", "chance_high", "low", "high",
)  # fmt: skip


@dataclass(frozen=True)
class Representation:
    """One frozen representation of the probed cells.

    Parameters
    ----------
    method
        The model's key; `pca` or `genes` for the references.
    name
        Name in the table.
    values
        (n_cells, n_dimensions).
    seed
        Training seed of the model; None for the references, which have none.
    """

    method: str
    name: str
    values: np.ndarray
    seed: int | None = None


def probe_split(
    prepared: Path, split: Path, features: Path, models: Mapping[str, Path], spec: ProbeSpec, out: Path
) -> None:
    """Probe PCA, raw genes and the models' representations of a split's test cells for their condition.

    Parameters
    ----------
    prepared, split, features
        `prepared.h5ad`, `split.csv` and `features.csv`. The probed cells are the perturbed cells of the test part.
    models
        Fitted models by name; what stands after an `@` in a name is dropped, so that several seeds can be given.
        `represent` is probed, and where a model has `encode_background`, z_ι as well.
    spec
        Options of the probe.
    out
        Table to write, a row per representation and metric; see `COLUMNS`. `chance` is the mean over permutations,
        `chance_high` their 95 % quantile.

    Raises
    ------
    LeakageError
        If features or a model are of another split, since the probed cells may then have trained it.
    DataError
        If fewer than two conditions have enough cells, or a model's genes are not the features'.
    """
    frozen, chosen = read_split(split), read_features(features)
    if chosen.header.get("split_sha256") != frozen.header["sha256"]:
        raise LeakageError(f"{features}: made from another split than {split}; rerun `perturbed features`")
    X, labels, names = _probed_cells(prepared, frozen.table, chosen, spec, str(split))
    found = _reference_representations(X, chosen, spec)
    for name, path in models.items():
        found += _represent(name.partition("@")[0], path, X, names, chosen, frozen.header["sha256"])
    head = {key: frozen.header.get(key, "") for key in ("dataset", "split", "fold")}
    rows = [{**head, **row} for representation in found for row in probe(representation, labels, spec)]
    with atomic(out) as part:
        pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(part, index=False, lineterminator="\n", float_format="%.9g")


def probe(representation: Representation, labels: np.ndarray, spec: ProbeSpec) -> list[dict[str, Any]]:
    """Rows of one representation: as it is, and at each smaller width of `spec.dimensions`.

    Parameters
    ----------
    representation
        What is probed.
    labels
        Condition of each cell (n_cells,).
    spec
        Options.
    """
    width = representation.values.shape[1]
    rows = []
    for n_dimensions in (None, *sorted(k for k in spec.dimensions if k < width)):
        predicted = classify(representation.values, labels, spec, n_dimensions)
        head = {
            "method": representation.method,
            "representation": representation.name,
            "seed": "" if representation.seed is None else representation.seed,
            "n_dimensions": n_dimensions or width,
            "reduced": n_dimensions is not None,
            "n_conditions": len(np.unique(labels)),
            "n_cells": len(labels),
        }
        rows += [{**head, **row} for row in score(labels, predicted, spec)]
    return rows


def classify(values: np.ndarray, labels: np.ndarray, spec: ProbeSpec, n_dimensions: int | None = None) -> np.ndarray:
    """Out-of-fold predictions of a multinomial logistic regression with a ridge penalty (n_cells,).

    Scaling, reduction and the choice of C use the probe's training folds only.

    Parameters
    ----------
    values
        Representation (n_cells, n_dimensions).
    labels
        Condition of each cell (n_cells,).
    spec
        Folds and penalties.
    n_dimensions
        Reduce to so many principal components first; None for none.
    """
    from sklearn.model_selection import StratifiedKFold

    values = np.asarray(values, dtype=np.float64)
    predicted = np.empty(len(labels), dtype=object)
    folds = StratifiedKFold(spec.n_folds, shuffle=True, random_state=spec.seed)
    for train, test in folds.split(values, labels):
        inside, outside = values[train], values[test]
        if n_dimensions is not None:
            inside, outside = _reduce(inside, outside, n_dimensions)
        penalty = _choose_penalty(inside, labels[train], spec)
        predicted[test] = _fit_and_predict(inside, labels[train], outside, penalty)
    return predicted


def score(labels: np.ndarray, predicted: np.ndarray, spec: ProbeSpec) -> list[dict[str, Any]]:
    """Balanced accuracy and accuracy of predictions, each with chance and interval.

    Balanced accuracy is the mean over conditions of the share of their cells that are classified right. Chance comes
    from permuting the held-out labels against the predictions, which is what the accuracy would be if the probe's
    output told nothing of them; the interval from resampling conditions.
    """
    names, truth = np.unique(labels, return_inverse=True)
    guess = pd.Index(names).get_indexer(predicted)
    rng = np.random.default_rng([spec.seed, 41])
    size = np.bincount(truth, minlength=len(names))

    def hits(order: np.ndarray) -> np.ndarray:
        return np.bincount(order[order == guess], minlength=len(names))

    null = np.stack([hits(rng.permutation(truth)) for _ in range(spec.n_permutations)])
    right = hits(truth)
    draws = rng.integers(len(names), size=(spec.n_bootstrap, len(names)))
    tail = (1 - spec.confidence) / 2
    rows = []
    for metric in ("balanced_accuracy", "accuracy"):
        weight = 1 / size if metric == "balanced_accuracy" else np.ones(len(names))
        total = (size * weight).sum()
        chance = (null * weight).sum(axis=1) / total
        boot = (right * weight)[draws].sum(axis=1) / (size * weight)[draws].sum(axis=1)
        low, high = np.quantile(boot, [tail, 1 - tail])
        value = (right * weight).sum() / total
        limits = {"chance": chance.mean(), "chance_high": np.quantile(chance, 0.95), "low": low, "high": high}
        rows.append({"metric": metric, "value": value, **limits})
    return rows


# --- the probe --------------------------------------------------------------------------------------------------------


def _fit_and_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    if train.shape[1] > train.shape[0]:
        # a ridge penalty is blind to rotations, so that the space of the training cells is all that can matter
        basis = np.linalg.svd(train, full_matrices=False)[2].T
        train, test = train @ basis, test @ basis
    model = LogisticRegression(C=penalty, max_iter=2000, tol=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train, labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        log.warning("probe: the logistic regression did not converge (C = %g); scores may be low", penalty)
    return np.asarray(model.predict(test))


def _choose_penalty(values: np.ndarray, labels: np.ndarray, spec: ProbeSpec) -> float:
    """The penalty of best inner accuracy; the strongest of equals."""
    from sklearn.model_selection import StratifiedKFold

    if len(spec.penalties) == 1:
        return spec.penalties[0]
    folds = StratifiedKFold(spec.inner_folds, shuffle=True, random_state=spec.seed)
    right = dict.fromkeys(sorted(spec.penalties), 0)
    for train, test in folds.split(values, labels):
        for penalty in right:
            guess = _fit_and_predict(values[train], labels[train], values[test], penalty)
            right[penalty] += int((guess == labels[test]).sum())
    return max(right, key=lambda penalty: right[penalty])


def _reduce(train: np.ndarray, test: np.ndarray, n_dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores on the leading principal components of the training cells."""
    mean = train.mean(axis=0)
    basis = np.linalg.svd(train - mean, full_matrices=False)[2][:n_dimensions].T
    return (train - mean) @ basis, (test - mean) @ basis


# --- cells and representations ----------------------------------------------------------------------------------------


def _probed_cells(
    prepared: Path, table: pd.DataFrame, features: Features, spec: ProbeSpec, where: str
) -> tuple[sparse.csr_matrix, np.ndarray, list[str]]:
    """Expression of the test part's perturbed cells on the features' genes, and the cells' conditions and names."""
    cells = open_prepared(prepared)
    test = table[(table["part"] == "test") & (table["perturbation"] != CONTROL)]["perturbation"]
    least = max(spec.min_cells, spec.n_folds)
    count = test.value_counts()
    enough = count.index[count >= least]
    if len(enough) < 2:
        raise DataError(
            f"{where}: {len(enough)} conditions have {least} test cells or more, a probe needs two; probe a "
            "`heldout_cells` split that holds cells of every condition out"
        )
    if len(enough) < len(count):
        log.info("probe: %d of %d conditions have too few test cells", len(count) - len(enough), len(count))
    test = _cap(test[test.isin(enough)], spec)
    rows = np.sort(cells.obs.index.get_indexer(test.index))
    columns = cells.var.index.get_indexer(features.genes)
    if rows[0] < 0 or (columns < 0).any():
        raise DataError(f"{prepared}: lacks cells of {where} or genes of its features; rerun the stages after it")
    names = cells.obs.index[rows]
    return read_rows(cells.X, rows)[:, columns], test.reindex(names).to_numpy(dtype=str), list(names)


def _cap(test: pd.Series, spec: ProbeSpec) -> pd.Series:
    if spec.max_cells is None:
        return test
    rng = np.random.default_rng([spec.seed, 42])
    shuffled = test.sort_index().iloc[rng.permutation(len(test))]
    return shuffled.groupby(shuffled, sort=False).head(spec.max_cells)


def _reference_representations(X: sparse.csr_matrix, features: Features, spec: ProbeSpec) -> list[Representation]:
    scores = X @ features.loadings - features.mean @ features.loadings
    found = [Representation("pca", "PCA", np.asarray(scores))]
    if spec.raw_genes:
        found.append(Representation("genes", "genes", X.toarray()))
    return found


def _represent(
    name: str, path: Path, X: sparse.csr_matrix, cells: list[str], features: Features, split_sha256: str
) -> list[Representation]:
    from perturbed.models.base import load_model

    method = load_model(path)
    extra = json.loads((path / "config.json").read_text())["extra"]
    if extra.get("sha256") != split_sha256:
        raise LeakageError(f"{path}: trained on another split, so that it may have seen the probed cells; fit it anew")
    columns = features.genes.get_indexer(pd.Index(method.genes))
    if (columns < 0).any():
        raise DataError(f"{path}: has genes that the features have not; fit it on these features")
    X = sparse.csr_matrix(X[:, columns])
    found = [Representation(name, name, method.represent_cells(X, cells), extra.get("seed"))]
    background = getattr(method, "encode_background", None)
    if background is not None:
        found.append(Representation(name, f"{name}, z_iota", background(X), extra.get("seed")))
    return found
