from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_world import FEATURES, make_counts, make_fold, make_prepared
from perturbed.config import Context, FeatureSpec
from perturbed.data.contracts import read_features, read_prepared, read_split, write_features, write_h5ad, write_split
from perturbed.data.ondisk import open_tables
from perturbed.data.split import make_split
from perturbed.errors import DataError, LeakageError
from perturbed.models.inputs import load_training_data


@pytest.fixture
def files(tmp_path):
    prepared = make_prepared(
        tmp_path, make_counts(contexts=("T", "B")), keys={"context": "context", "keep": {"lane": "batch"}}
    )
    return prepared, *make_fold(tmp_path, prepared)


def test_against_the_whole_file(files):
    prepared, split, features = (read(path) for read, path in zip((read_prepared, read_split, read_features), files))
    data = load_training_data(*files)
    part = split.table["part"].reindex(prepared.obs_names)
    seen = prepared[part.isin(["train", "val"]).to_numpy()]
    columns = prepared.var_names.get_indexer(features.genes)
    assert data.genes == tuple(features.genes) and isinstance(data.X, sparse.csr_matrix) and data.X.dtype == np.float32
    np.testing.assert_array_equal(data.X.toarray(), seen.X.toarray()[:, columns])
    np.testing.assert_array_equal(data.counts.toarray(), seen.layers["counts"].toarray()[:, columns])
    np.testing.assert_array_equal(data.library, seen.layers["counts"].toarray().sum(1))
    assert list(data.perturbation) == list(seen.obs["perturbation"]) and list(data.context) == list(seen.obs["context"])
    assert list(data.is_val) == list(part[seen.obs_names] == "val") and data.is_val.any()
    assert list(data.covariates.columns) == ["lane"] and list(data.covariates["lane"]) == list(seen.obs["lane"])
    assert data.loadings.shape == (len(data.genes), 5) and len(data.centre) == len(data.genes)
    assert not set(data.perturbation) & set(split.table.query("subgroup != ''")["perturbation"])


def test_cells_of_test_are_not_needed(files):
    """Test cells may hold anything, even what cannot be read as numbers."""
    expected = load_training_data(*files)
    split = read_split(files[1])
    with h5py.File(files[0], "r+") as file:
        names = file["obs"][file["obs"].attrs["_index"]][:].astype(str)
        hidden = np.flatnonzero(~np.isin(names, split.cells("train", "val")))
        for key in ("X", "layers/counts"):
            indptr = file[key]["indptr"][:]
            for row in hidden:
                file[key]["data"][indptr[row] : indptr[row + 1]] = np.nan
    found = load_training_data(*files)
    assert (found.X != expected.X).nnz == 0 and (found.counts != expected.counts).nnz == 0
    np.testing.assert_array_equal(found.library, expected.library)


def test_data_without_counts(tmp_path):
    raw = make_counts()
    raw.X = sparse.csr_matrix(np.log1p(raw.X.toarray()))
    prepared = make_prepared(tmp_path, raw, keys={"counts": None}, prepare={"normalise": "none"})
    data = load_training_data(prepared, *make_fold(tmp_path, prepared))
    assert data.counts is None and data.library is None and set(data.context) == {"all"}


def test_order_of_rows_and_genes_is_by_name(files):
    expected = load_training_data(*files)
    turned = read_prepared(files[0])[::-1, ::-1].copy()
    turned.X, turned.layers["counts"] = sparse.csr_matrix(turned.X), sparse.csr_matrix(turned.layers["counts"])
    write_h5ad(files[0], turned)
    found = load_training_data(*files)
    assert found.genes == expected.genes
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray()[::-1])
    assert list(found.perturbation) == list(expected.perturbation[::-1])


def test_features_of_another_split(files):
    prepared, split, features = files
    other = make_split(
        read_prepared(prepared).obs, Context(kind="context", contexts="T"), dataset="world", name="other"
    )
    write_split(split, other)
    with pytest.raises(LeakageError, match=r"features\.csv: made from another split .* rerun `perturbed features`"):
        load_training_data(prepared, split, features)


def test_cells_that_are_not_there(files, tmp_path):
    prepared = read_prepared(files[0])
    gone = prepared.obs_names[3]
    write_h5ad(files[0], prepared[prepared.obs_names != gone].copy())
    with pytest.raises(DataError, match=rf"split\.csv: 1 cells are not in .*, such as '{gone}'"):
        load_training_data(*files)


def test_labels_that_differ(files):
    prepared = read_prepared(files[0])
    labels = prepared.obs["perturbation"].astype(str)
    cell = labels.index[labels == "A"][0]
    labels[cell] = "B"
    prepared.obs["perturbation"] = labels
    write_h5ad(files[0], prepared)
    with pytest.raises(DataError, match=rf"cell '{cell}' is 'A' there but 'B' in .*\(1 such cells\)"):
        load_training_data(*files)


def test_genes_that_are_not_there(files):
    features = read_features(files[2])
    table = features.table.rename(index={features.genes[0]: "stranger"})
    write_features(files[2], type(features)(table, features.header))
    with pytest.raises(DataError, match="gene 'stranger' is not in"):
        load_training_data(*files)


def test_missing_and_truncated_files(files):
    prepared, split, features = files
    with pytest.raises(DataError, match="no such file; make it with `perturbed prepare`"):
        load_training_data(prepared.with_name("absent.h5ad"), split, features)
    prepared.write_bytes(prepared.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"not a readable h5ad .*truncated"):
        load_training_data(prepared, split, features)


def test_all_genes_in_the_order_of_the_file(tmp_path):
    prepared = make_prepared(tmp_path)
    files = make_fold(tmp_path, prepared, features=FeatureSpec(n_hvg="all", n_pcs=FEATURES.n_pcs))
    assert load_training_data(prepared, *files).genes == tuple(read_prepared(prepared).var_names)


def test_tables_are_read_as_anndata_reads_them(files):
    prepared = read_prepared(files[0])
    n = prepared.n_obs
    prepared.obs["number"] = np.linspace(0, 1, n)
    prepared.obs["flag"] = np.arange(n) % 2 == 0
    prepared.obs["ordered"] = pd.Categorical(
        ["low", "high"] * (n // 2) + ["low"] * (n % 2), ["low", "high"], ordered=True
    )
    prepared.obs["absent"] = pd.Categorical.from_codes([-1] + [0] * (n - 1), ["x"])
    prepared.obs["rare"] = pd.array([1, None] + [3] * (n - 2), dtype="Int64")
    write_h5ad(files[0], prepared)
    expected, found = read_prepared(files[0]), open_tables(files[0])
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert found.X.shape == expected.shape and found.X.format == "csr" and list(found.layers) == ["counts"]


def test_a_file_that_is_not_prepared(files):
    prepared = read_prepared(files[0])
    del prepared.obs["context"], prepared.uns["perturbed"]
    write_h5ad(files[0], prepared)
    with pytest.raises(
        DataError, match=r"not a prepared file: obs\['context'\] is missing, uns\['perturbed'\] is missing"
    ):
        load_training_data(*files)


def test_a_baseline_is_fitted_without_importing_torch_or_anndata(files, tmp_path):
    code = f"""
import sys
from pathlib import Path
from perturbed.models.fitting import fit_model
spec = {{"title": "A", "implementation": "perturbed.models.baselines:Additive"}}
paths = map(Path, {[str(path) for path in (*files, tmp_path / "model")]})
fit_model(spec, *paths, device="auto", threads=2)
slow = {{"torch", "anndata", "sklearn", "scanpy", "scvi"}} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "state.npz"]
