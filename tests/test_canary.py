"""The first law: nothing sees the test cells before `evaluate`.

The values of all test cells are replaced (genes shuffled within the cell, depth times three). Everything that training
makes must then be the same, byte by byte; with a planted leak it must not be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from data_world import FEATURES, make_counts, make_fold, make_prepared
from perturbed.config import HeldoutCells, SplitSpec, UnseenCombo, UnseenSingle
from perturbed.data import features as features_module
from perturbed.data.contracts import Prediction, read_prepared, read_split, write_h5ad, write_prediction
from perturbed.data.matrices import column_moments
from perturbed.models.fitting import fit_model
from perturbed.models.spec import load_method_spec
from quick_methods import QUICK, write_side_files

METHODS = Path(__file__).parents[1] / "config" / "methods"
SPECS: dict[str, SplitSpec] = {
    "zero_shot": UnseenCombo(kind="unseen_combo"),
    "unseen_single": UnseenSingle(kind="unseen_single", folds=3),
    "heldout_cells": HeldoutCells(kind="heldout_cells", n_perturbations=2, n_cells=5, min_cells=6),
}


def replace_test_cells(prepared: Path, split: Path, out: Path) -> None:
    adata, rng = read_prepared(prepared), np.random.default_rng(1)
    test = adata.obs_names.get_indexer(read_split(split).cells("test", "unused"))
    X, counts = adata.X.toarray(), adata.layers["counts"].toarray()
    before = X.copy()
    for row in test:
        order = rng.permutation(adata.n_vars)
        X[row], counts[row] = np.log1p(3 * np.expm1(X[row, order])), 3 * counts[row, order]
    assert (before != X).any(axis=1).sum() == len(test) > 0
    adata.X, adata.layers["counts"] = sparse.csr_matrix(X), sparse.csr_matrix(counts)
    write_h5ad(out, adata)


def method_spec(name: str, folder: Path) -> dict[str, Any]:
    spec = load_method_spec(name, [METHODS])
    params = {**spec.params, **QUICK.get(name, {})}
    if name == "external":
        genes = tuple(read_prepared(folder / "prepared.h5ad").var_names)
        mean = np.ones((1, len(genes)), dtype=np.float32)
        write_prediction(folder / "mine.h5ad", Prediction(mean, genes, ("A+B",), ("all",)))
        params["path"] = str(folder / "mine.h5ad")
    return {**spec.model_dump(mode="json"), "params": params}


def side_files(prepared: Path) -> dict[str, Path]:
    """Files that come from elsewhere; they are the same whatever the test cells hold."""
    adata = read_prepared(prepared)
    return write_side_files(prepared.parent, list(adata.var_names), list(adata.obs_names), adata.X)


@pytest.fixture
def canary(tmp_path) -> Callable[..., None]:
    """Make every training artefact from the cells as they are and from replaced test cells, and compare the bytes."""

    def compare(
        split_spec: SplitSpec, method: str | None = None, leak: Callable[[Path, Path], Any] | None = None
    ) -> None:
        original = make_prepared(tmp_path, make_counts(n_cells=10, n_genes=60))
        split, _ = make_fold(tmp_path, original, split_spec)
        changed = tmp_path / "changed" / "prepared.h5ad"
        changed.parent.mkdir()
        replace_test_cells(original, split, changed)
        found = []
        for prepared in (original, changed):
            with pytest.MonkeyPatch.context() as patch:
                if leak is not None:
                    patch.setattr(features_module, *leak(prepared, split))
                features = make_fold(prepared.parent, prepared, split_spec)[1]
            artefacts = {"split.csv": split.with_name("split.csv"), "features.csv": features}
            if method is not None:
                model = prepared.parent / "model"
                spec = method_spec(method, tmp_path)
                fit_model(spec, prepared, split, features, model, seed=3, device="cpu", files=side_files(original))
                artefacts |= {path.name: path for path in model.iterdir()}
            found.append({name: path.read_bytes() for name, path in artefacts.items()})
        for name, content in found[0].items():
            assert content == found[1][name], f"{name} depends on test cells"

    return compare


@pytest.mark.parametrize("name", SPECS)
def test_features_do_not_see_test_cells(canary, name):
    canary(SPECS[name])


@pytest.mark.parametrize("method", sorted(path.stem for path in METHODS.glob("*.yaml")))
def test_methods_do_not_see_test_cells(canary, method):
    if load_method_spec(method, [METHODS]).environment:
        pytest.skip("runs in an environment of its own; see its tests")
    canary(SPECS["zero_shot"], method)


def leak_genes(prepared: Path, split: Path) -> tuple[str, Callable[..., Any]]:
    """Highly variable genes on all cells."""
    choose, everything = features_module.choose_genes, read_prepared(prepared).X
    return "choose_genes", lambda train, *rest: choose(everything, *rest)


def leak_pca(prepared: Path, split: Path) -> tuple[str, Callable[..., Any]]:
    """PCA on all cells, on the genes that training cells chose."""
    fit, adata = features_module.fit_pca, read_prepared(prepared)
    rows = features_module.training_rows(adata, read_split(split))
    chosen = features_module.choose_genes(adata.X[rows], adata.var, FEATURES, set("ABCDEF"))
    cells = sparse.csr_matrix(adata.X[:, chosen])
    return "fit_pca", lambda values, mean, *rest: fit(cells, column_moments(cells)[0], *rest)


@pytest.mark.parametrize("leak", [leak_genes, leak_pca])
@pytest.mark.parametrize("method", [None, "pca_ridge"])
def test_planted_leaks_kill_the_canary(canary, leak, method):
    with pytest.raises(AssertionError, match=r"features\.csv depends on test cells"):
        canary(SPECS["zero_shot"], method, leak)
