from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy import sparse

from data_world import FEATURES, make_counts, make_fold, make_prepared
from perturbed.config import FeatureSpec
from perturbed.data import features as module
from perturbed.data.contracts import Split, read_features, read_prepared, read_split, write_split
from perturbed.data.features import compute_features, fit_pca, normalised_dispersion
from perturbed.data.matrices import column_moments
from perturbed.errors import DataError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    raw = make_counts(n_genes=80)
    raw.X = sparse.csr_matrix(raw.X.toarray() * (np.arange(80) != 10))  # a gene without counts
    prepared = make_prepared(folder, raw)
    split, _ = make_fold(folder, prepared)
    return read_prepared(prepared), read_split(split)


def training_values(world) -> np.ndarray:
    prepared, split = world
    return prepared[split.table.index[split.table["part"] == "train"]].X.toarray().astype(np.float64)


def random_cells(n_cells, n_genes, seed=0, rank=8):
    rng = np.random.default_rng(seed)
    scale = np.geomspace(6, 1, rank)[:, None]
    dense = rng.normal(size=(n_cells, rank)) @ (scale * rng.normal(size=(rank, n_genes))) / 3 + rng.normal(size=n_genes)
    return sparse.csr_matrix(np.maximum(dense, 0).astype(np.float32))


def dense_pca(values: np.ndarray, k: int) -> np.ndarray:
    _, _, rows = np.linalg.svd(values - values.mean(0), full_matrices=False)
    loadings = rows[:k].T
    return loadings * np.sign(loadings[np.abs(loadings).argmax(0), np.arange(k)])


def test_against_a_dense_reference(world):
    prepared, split = world
    values = training_values(world)
    found = compute_features(prepared, split, FEATURES)
    positions = prepared.var_names.get_indexer(found.genes)
    assert (np.diff(positions) > 0).all(), "order of the prepared file"
    kept = values[:, positions]
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.table["sd"], kept.std(0), rtol=1e-10)
    np.testing.assert_allclose(found.loadings, dense_pca(kept, 5), atol=1e-8)
    assert found.header["split_sha256"] == split.header["sha256"] and found.header["n_cells"] == len(values)
    assert found.header["upstream"] is False and found.header["spec"] == FEATURES.model_dump(mode="json")


@pytest.mark.parametrize("n_top", [5, 20, 60])
def test_genes_are_those_of_scanpy(world, n_top):
    prepared, split = world
    train = anndata.AnnData(sparse.csr_matrix(training_values(world)), var=prepared.var[[]].copy())
    reference = scanpy.pp.highly_variable_genes(train, n_top_genes=n_top, flavor="seurat", inplace=False)
    found = compute_features(prepared, split, FeatureSpec(n_hvg=n_top, n_pcs=3, keep_perturbed=False))
    assert set(found.genes) == set(prepared.var_names[reference["highly_variable"]])
    np.testing.assert_allclose(normalised_dispersion(train.X), reference["dispersions_norm"], rtol=1e-4, atol=1e-6)


def test_perturbed_genes_are_kept_if_trained(world):
    prepared, split = world
    found = compute_features(prepared, split, FeatureSpec(n_hvg=3, n_pcs=2))
    assert set("ABCDEF") <= set(found.genes) and len(found.genes) <= 9
    table = split.table.copy()
    table.loc[table["perturbation"].str.contains("A"), "part"] = "test"
    without = compute_features(prepared, Split(table, split.header), FeatureSpec(n_hvg=3, n_pcs=2))
    bare = compute_features(prepared, Split(table, split.header), FeatureSpec(n_hvg=3, n_pcs=2, keep_perturbed=False))
    assert set("BCDEF") <= set(without.genes) and ("A" in without.genes) == ("A" in bare.genes)


def test_all_genes(world):
    prepared, split = world
    for n_hvg in ("all", 80, 1000):
        assert list(compute_features(prepared, split, FeatureSpec(n_hvg=n_hvg, n_pcs=2)).genes) == list(
            prepared.var_names
        )


def test_ties_are_broken_by_name():
    values = np.tile(np.random.default_rng(0).poisson(1.0, size=(40, 1)), (1, 6)).astype(np.float32)
    var = pd.DataFrame({"symbol": list("fbdace")}, index=list("fbdace"))
    spec = FeatureSpec(n_hvg=2, keep_perturbed=False)
    chosen = module.choose_genes(sparse.csr_matrix(values), var, spec, set())
    assert list(var.index[chosen]) == ["b", "a"]


def test_validation_and_test_cells_do_not_matter(world):
    prepared, split = world
    expected = compute_features(prepared, split, FEATURES)
    other = prepared.copy()
    rows = prepared.obs_names.get_indexer(split.cells("val", "test", "unused"))
    dense = other.X.toarray()
    dense[rows] = np.random.default_rng(0).gamma(1, 1, size=(len(rows), prepared.n_vars))
    other.X = sparse.csr_matrix(dense)
    pd.testing.assert_frame_equal(compute_features(other, split, FEATURES).table, expected.table, check_exact=True)


def test_order_of_cells_hardly_matters_and_bytes_repeat(world, tmp_path):
    prepared, split = world
    first = compute_features(prepared, split, FEATURES)
    pd.testing.assert_frame_equal(compute_features(prepared, split, FEATURES).table, first.table, check_exact=True)
    turned = compute_features(prepared[::-1].copy(), split, FEATURES)
    pd.testing.assert_frame_equal(turned.table, first.table, rtol=1e-9, atol=1e-9)
    path = make_prepared(tmp_path)
    one = make_fold(tmp_path, path)[1].read_bytes()
    assert make_fold(tmp_path, path)[1].read_bytes() == one


def test_backed_equals_memory(tmp_path):
    path = make_prepared(tmp_path)
    split, chosen = make_fold(tmp_path, path)
    in_memory = compute_features(read_prepared(path), read_split(split), FEATURES)
    pd.testing.assert_frame_equal(read_features(chosen).table, in_memory.table, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("limit", "n_cells", "n_genes"),
    [(1000, 300, 40), (1000, 40, 300), (100, 40, 300), (0, 300, 40), (0, 40, 300), (0, 120, 110)],
    ids=["covariance", "covariance-wide", "gram", "lanczos", "lanczos-wide", "lanczos-square"],
)
def test_every_way_to_the_components(monkeypatch, limit, n_cells, n_genes):
    values = random_cells(n_cells, n_genes)
    mean, _ = column_moments(values)
    monkeypatch.setattr(module, "_EXACT", limit)
    found = fit_pca(values, mean, 6, seed=0)
    np.testing.assert_allclose(found, dense_pca(values.toarray().astype(np.float64), 6), atol=1e-7)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-9)
    assert (fit_pca(values, mean, 6, seed=0) == found).all()


def test_components_are_capped_at_the_rank():
    mean = column_moments(random_cells(5, 30))[0]
    assert fit_pca(random_cells(5, 30), mean, 50, seed=0).shape == (30, 4)
    flat = sparse.csr_matrix(np.ones((10, 4), dtype=np.float32))
    with pytest.raises(DataError, match="training cells do not vary"):
        fit_pca(flat, np.ones(4), 2, seed=0)


def test_unknown_cells_are_named(world, tmp_path):
    prepared, split = world
    write_split(tmp_path / "split.csv", split)
    train = split.cells("train")
    with pytest.raises(DataError, match=rf"1 training cells are not in the prepared data, such as '{train[0]}'"):
        compute_features(prepared[prepared.obs_names != train[0]], split, FEATURES)
