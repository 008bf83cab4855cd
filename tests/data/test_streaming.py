"""Matrices on disk are what they are in memory, and their training order is a fair one."""

from __future__ import annotations

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_world import FEATURES, card, make_counts, make_fold, make_prepared, write_raw
from perturbed.data import features, prepare_streamed, streaming
from perturbed.data.contracts import open_prepared, read_features, read_prepared, read_split
from perturbed.data.features import compute_features
from perturbed.data.matrices import column_moments, read_rows
from perturbed.data.ondisk import open_tables
from perturbed.data.prepare import prepare
from perturbed.data.prepare_streamed import CsrWriter, prepare_file
from perturbed.data.streaming import (
    StreamedMatrix,
    available_memory,
    batch_by_windows,
    draw_windows,
    memory_budget,
)
from perturbed.errors import ConfigError, DataError
from perturbed.evaluation.leakage import check_leakage

TINY = 1e-9
"""A memory budget of one byte."""
LOGGED = {"keys": {"counts": None}, "prepare": {"normalise": "none"}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that every file of these tests has many."""
    monkeypatch.setattr("perturbed.data.matrices._BLOCK", 200)
    monkeypatch.setattr(streaming, "_READ_VALUES", 150)
    monkeypatch.setattr(streaming, "_GAP_VALUES", 40)


@pytest.fixture
def pair(tmp_path):
    """The same matrix on disk and in memory."""
    path = make_prepared(tmp_path)
    return open_tables(path).X, read_prepared(path).X


# --- the matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, np.array([3, 1, 40])])
@pytest.mark.parametrize("state", ["disk", "pinned", "loaded", "both"])
def test_rows_are_those_in_memory_in_any_order(pair, columns, state):
    source, whole = pair
    rows = np.arange(0, whole.shape[0], 2)
    streamed = StreamedMatrix(source, rows, columns)
    expected = whole[rows] if columns is None else whole[rows][:, columns]
    rng = np.random.default_rng(0)
    if state in ("pinned", "both"):
        streamed.pin(rng.permutation(len(rows))[:20])
    if state in ("loaded", "both"):
        streamed.load(rng.permutation(len(rows))[:30])
        streamed.load(rng.permutation(len(rows))[:30])
    for wanted in (rng.integers(0, len(rows), 50), np.arange(len(rows)), np.array([5]), np.zeros(0, dtype=int)):
        found = streamed[wanted]
        assert found.dtype == np.float32 and found.shape == (len(wanted), expected.shape[1])
        np.testing.assert_array_equal(found.toarray(), expected[wanted].toarray())
    assert streamed.shape == expected.shape


def test_loaded_rows_come_from_memory(pair, monkeypatch):
    source, _ = pair
    streamed = StreamedMatrix(source)
    streamed.pin(np.arange(10))
    streamed.load(np.arange(5, 30))
    reads = []
    monkeypatch.setattr(StreamedMatrix, "_read_span", lambda self, rows: reads.append(rows) or 1 / 0)
    streamed[np.array([29, 0, 9, 10])]
    with pytest.raises(ZeroDivisionError):
        streamed[np.array([30])]
    streamed.release()
    with pytest.raises(ZeroDivisionError):
        streamed[np.array([29])]
    streamed[np.array([9])]


def test_sums_and_products_are_those_in_memory(pair):
    source, whole = pair
    rows, columns = np.arange(10, 90), np.array([7, 0, 30, 2])
    streamed, matrix = StreamedMatrix(source, rows, columns), whole[rows][:, columns].astype(np.float64)
    dense = matrix.toarray()
    np.testing.assert_allclose(streamed.sum(0), dense.sum(0, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(streamed.mean(1), dense.mean(1, keepdims=True), rtol=1e-12)
    weights = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(streamed @ weights, dense @ weights, rtol=1e-12)
    left = sparse.random(5, len(rows), density=0.3, format="csr", random_state=np.random.default_rng(1))
    np.testing.assert_allclose((left @ streamed).toarray(), left.toarray() @ dense, rtol=1e-12)
    np.testing.assert_allclose(left.toarray() @ streamed, left.toarray() @ dense, rtol=1e-12)
    for expm1 in (False, True):
        values = np.expm1(dense) if expm1 else dense
        mean, variance = column_moments(streamed, expm1=expm1)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(variance, values.var(0), rtol=1e-9)


def test_moments_over_all_genes_are_those_in_memory_to_the_byte(pair):
    source, whole = pair
    rows = np.arange(3, 120, 3)
    for ours, theirs in zip(column_moments(StreamedMatrix(source, rows)), column_moments(read_rows(whole, rows))):
        assert ours.tobytes() == theirs.tobytes()


def test_the_checksum_is_of_values_and_places(pair):
    source, whole = pair
    rows = np.arange(whole.shape[0])
    assert StreamedMatrix(source, rows).checksum() == StreamedMatrix(source).checksum()
    assert StreamedMatrix(source, rows[1:]).checksum() != StreamedMatrix(source).checksum()
    assert StreamedMatrix(source, columns=np.arange(5)).checksum() != StreamedMatrix(source).checksum()


def test_columns_by_columns_cannot_be_streamed(tmp_path):
    path = tmp_path / "x.h5ad"
    anndata.AnnData(sparse.random(6, 4, 0.5, format="csc")).write_h5ad(path)
    with h5py.File(path) as file, pytest.raises(DataError, match="not CSR"):
        StreamedMatrix(anndata.io.sparse_dataset(file["X"]))


# --- the order ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_CELLS", 4)
    monkeypatch.setattr(streaming, "WINDOW_CELLS", 40)


@pytest.mark.parametrize(("n", "batch"), [(203, 8), (40, 8), (7, 16), (1, 1), (120, 64)])
def test_every_cell_comes_once_in_full_batches(pair, small_windows, n, batch):
    streamed = StreamedMatrix(pair[0])
    n = min(n, streamed.shape[0])
    rows = np.sort(np.random.default_rng(0).permutation(streamed.shape[0])[:n])
    batches = list(batch_by_windows((streamed,), rows, batch, np.random.default_rng(1)))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), rows)
    assert all(len(part) == batch for part in batches[:-1])
    assert (streamed._cache == -1).all()  # nothing is kept after the epoch


def test_the_order_is_the_seed_s_and_not_the_memory_s(pair, small_windows):
    streamed, other = StreamedMatrix(pair[0]), StreamedMatrix(pair[0])
    other.pin(np.arange(50))
    rows = np.arange(100)
    first = list(batch_by_windows((streamed,), rows, 8, np.random.default_rng(3)))
    second = list(batch_by_windows((other, streamed), rows, 8, np.random.default_rng(3)))
    third = list(batch_by_windows((streamed,), rows, 8, np.random.default_rng(4)))
    assert np.concatenate(first).tobytes() == np.concatenate(second).tobytes()
    assert np.concatenate(first).tobytes() != np.concatenate(third).tobytes()


def test_a_generator_is_used_up_before_the_first_batch(pair, small_windows):
    """So that the draws of a training step, from the same generator, do not depend on how far the order has come."""
    ours, theirs = np.random.default_rng(3), np.random.default_rng(3)
    next(batch_by_windows((StreamedMatrix(pair[0]),), np.arange(100), 8, ours))
    draw_windows(np.arange(100), 8, theirs)
    assert ours.random() == theirs.random()


def test_batches_mix_distant_cells(small_windows):
    """Of 1,000 cells in 10 conditions one after another, 20 successive ones (of ten blocks) see most conditions."""
    order, _ = draw_windows(np.arange(1000), 20, np.random.default_rng(0))
    seen = [len(set(part // 100)) for part in np.array_split(order, 50)]
    assert np.mean(seen) > 5
    same = np.mean(np.diff(order) == 1)  # neighbours of the file that are neighbours in the order
    assert same < 0.1
    positions = np.argsort(order)
    assert abs(np.corrcoef(positions, np.arange(1000))[0, 1]) < 0.25


# --- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_is_what_is_said_or_half_of_what_is_there(monkeypatch):
    monkeypatch.delenv("PERTURBED_MEMORY_GB", raising=False)
    monkeypatch.setattr(streaming, "available_memory", lambda: 10 * 10**9)
    assert memory_budget() == 5 * 10**9 and memory_budget(3) == 3 * 10**9
    monkeypatch.setenv("PERTURBED_MEMORY_GB", "0.5")
    assert memory_budget() == 5 * 10**8 and memory_budget(3) == 3 * 10**9
    for wrong in ("0", "many", "-1", "nan"):
        monkeypatch.setenv("PERTURBED_MEMORY_GB", wrong)
        with pytest.raises(ConfigError, match="PERTURBED_MEMORY_GB"):
            memory_budget()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_control_group_counts(tmp_path, version):
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    base = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    write(tmp_path / "proc/self/cgroup", "4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    assert available_memory(tmp_path) == 8000 * 1024
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    write(base / "job" / names[0], "5000000\n")
    write(base / "job" / names[1], "2000000\n")
    cached = "total_inactive_file" if version == 1 else "inactive_file"
    write(base / "job/memory.stat", f"anon 1\n{cached} 500000\n")
    write(base / "job/step" / names[0], "max\n")
    assert available_memory(tmp_path) == 3_500_000


def test_the_memory_of_a_slurm_job_counts_where_no_group_holds_it(tmp_path, monkeypatch):
    write(tmp_path / "proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    for asked, bytes_left in (("2000", 2000 * 2**20), ("0", 8_192_000_000), ("", 8_192_000_000)):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", asked)
        assert available_memory(tmp_path) == bytes_left


# --- prepare ------------------------------------------------------------------------------------------------------


def busy_raw() -> anndata.AnnData:
    """Counts in a layer, logged values in X, guides among the genes, mitochondrial genes, a repeated symbol."""
    raw = make_counts(contexts=("k562", "rpe1"), n_control=30)
    raw.var["symbol"] = [f"MT-{i}" if 10 <= i < 14 else name for i, name in enumerate(raw.var_names)]
    raw.var_names = [f"guide{i}" if i in (20, 21) else name for i, name in enumerate(raw.var_names)]
    raw.layers["counts"] = raw.X.copy()
    raw.X = raw.X.log1p()
    raw.uns["provenance"] = "{}"
    return raw


QUALITY = {"min_counts": 25, "min_genes": 8, "max_genes": 45, "max_mito": 0.4, "min_cells_per_perturbation": 6}
CASES = {
    "counts": (make_counts, {}),
    "dense": (lambda: make_dense(make_counts()), {}),
    "logged": (lambda: make_logged(make_counts()), LOGGED),
    "layer": (busy_raw, {"keys": {"counts": "counts", "symbol": "symbol", "context": "context"}}),
    "both": (
        busy_raw,
        {
            "keys": {"counts": "counts", "symbol": "symbol", "keep": {"batch": "batch"}, "drop_genes": "guide.*",
                     "drop": {"context": "rpe1"}},
            "prepare": {"normalise": "none", **QUALITY, "min_cells_per_gene": 20},
        },
    ),
    "quality": (
        busy_raw,
        {
            "keys": {"counts": "counts", "symbol": "symbol", "drop_genes": "guide.*", "context": "context"},
            "prepare": {**QUALITY, "min_cells_per_gene": 30},
            "expect": {"n_genes": 48},
        },
    ),
}  # fmt: skip


def make_dense(raw: anndata.AnnData) -> anndata.AnnData:
    raw.X = raw.X.toarray()
    return raw


def make_logged(raw: anndata.AnnData) -> anndata.AnnData:
    raw.X = raw.X.log1p()
    return raw


@pytest.mark.parametrize("case", CASES)
def test_preparing_by_blocks_is_preparing(tmp_path, case):
    make, sections = CASES[case]
    raw, described = write_raw(tmp_path, make()), card(**sections)
    expected = prepare(raw, described, "world")
    assert prepare_file(raw, described, "world", tmp_path / "out.h5ad", memory_gb=TINY)
    found = read_prepared(tmp_path / "out.h5ad")
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_names=False)
    pd.testing.assert_frame_equal(found.var, expected.var, check_names=False)
    assert {key: str(value) for key, value in found.uns["perturbed"].items()} == {
        key: str(value) for key, value in expected.uns["perturbed"].items()
    }
    assert set(found.layers) == set(expected.layers)
    for ours, theirs in [(found.X, expected.X), *((found.layers[key], expected.layers[key]) for key in found.layers)]:
        assert isinstance(ours, sparse.csr_matrix) and ours.dtype == np.float32
        for name in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    if case in ("both", "quality"):  # the thresholds do drop something
        dropped = json.loads(found.uns["perturbed"]["dropped"])
        assert dropped["min_counts"] and dropped["min_cells_per_gene"] and dropped["keys.drop_genes"] == 2


def test_later_stages_read_what_blocks_wrote(tmp_path):
    raw = write_raw(tmp_path, make_counts())
    prepare_file(raw, card(), "world", tmp_path / "blocks.h5ad", memory_gb=TINY)
    whole, blocks = open_prepared(make_prepared(tmp_path)), open_prepared(tmp_path / "blocks.h5ad")
    rows = np.arange(0, whole.n_obs, 3)
    for ours, theirs in ((blocks.X, whole.X), (blocks.layers["counts"], whole.layers["counts"])):
        np.testing.assert_array_equal(read_rows(ours, rows).toarray(), read_rows(theirs, rows).toarray())


def test_what_fits_is_prepared_as_ever_to_the_byte(tmp_path):
    raw = write_raw(tmp_path, make_counts())
    expected = make_prepared(tmp_path).read_bytes()
    assert not prepare_file(raw, card(), "world", tmp_path / "out.h5ad", memory_gb=1)
    assert (tmp_path / "out.h5ad").read_bytes() == expected


def test_streamed_bytes_are_the_same_every_time(tmp_path):
    raw = write_raw(tmp_path, make_counts())
    for name in ("one.h5ad", "two.h5ad"):
        prepare_file(raw, card(), "world", tmp_path / name, memory_gb=TINY)
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()


def spoil(value: float) -> anndata.AnnData:
    raw = make_counts()
    raw.X = raw.X.tocsr()
    raw.X[100, 17] = value
    return raw


@pytest.mark.parametrize(
    ("make", "sections"),
    [
        (lambda: spoil(np.nan), {}),
        (lambda: spoil(-1.0), {}),
        (lambda: spoil(0.5), {}),
        (make_counts, LOGGED),
        (make_counts, {"keys": {"counts": "raw"}}),
        (make_counts, {"keys": {"control": "nobody"}}),
        (make_counts, {"keys": {"drop": {"context": "all"}}}),
        (make_counts, {"prepare": {"min_counts": 10**6}}),
        (make_counts, {"prepare": {"max_mito": 0.1}}),
        (make_counts, {"expect": {"n_obs": 3}}),
        (make_counts, {"expect": {"x_sum": 12.0}}),
    ],
)
def test_errors_are_those_of_prepare_and_nothing_stays(tmp_path, make, sections):
    raw, described = write_raw(tmp_path, make()), card(**sections)
    with pytest.raises(DataError) as expected:
        prepare(raw, described, "world")
    with pytest.raises(DataError) as found:
        prepare_file(raw, described, "world", tmp_path / "out.h5ad", memory_gb=TINY)
    assert str(found.value) == str(expected.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.h5ad"]


def test_a_file_cut_short_is_named(tmp_path):
    raw = write_raw(tmp_path, make_counts())
    with h5py.File(raw, "r+") as file:
        del file["X"]["indices"]
    with pytest.raises(DataError, match=r"raw\.h5ad: not a readable h5ad"):
        prepare_file(raw, card(), "world", tmp_path / "out.h5ad", memory_gb=TINY)


def test_very_many_values_get_wide_bounds(tmp_path, monkeypatch):
    """Beyond 2³¹ values the bounds need 64 bits; the limit is lowered for the test."""
    monkeypatch.setattr(prepare_streamed, "_INT32_MAX", 10)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        writer = CsrWriter(file.create_group("X"), 4)
        for _ in range(3):
            writer.append(sparse.csr_matrix(np.ones((2, 4), dtype=np.float32)))
        writer.finish()
        assert file["X"]["indptr"].dtype == np.int64 and file["X"]["indptr"][-1] == 24


# --- features -----------------------------------------------------------------------------------------------------


def test_features_of_large_data_are_read_by_blocks(tmp_path, monkeypatch):
    prepared = make_prepared(tmp_path)
    split, plain = make_fold(tmp_path, prepared)
    expected, spec = read_features(plain), FEATURES
    monkeypatch.setattr(features, "_PCA_CELLS", 10**6)
    n_values = int((open_prepared(prepared).X[:].data != 0).sum())
    for large in (10, n_values // 3):  # all on disk, and only the chosen genes in memory
        monkeypatch.setattr(features, "_LARGE", large)
        found = compute_features(open_prepared(prepared), read_split(split), spec)
        assert found.header.items() <= expected.header.items()
        pd.testing.assert_frame_equal(found.table, expected.table, rtol=1e-7, atol=1e-7)


def test_the_pca_of_large_data_is_of_a_seeded_draw(tmp_path, monkeypatch):
    prepared = make_prepared(tmp_path)
    split, plain = make_fold(tmp_path, prepared)
    spec = FEATURES
    monkeypatch.setattr(features, "_LARGE", 10)
    monkeypatch.setattr(features, "_PCA_CELLS", 60)
    found = compute_features(open_prepared(prepared), read_split(split), spec)
    assert found.header["pca_cells"] == 60
    again = compute_features(open_prepared(prepared), read_split(split), spec)
    pd.testing.assert_frame_equal(found.table, again.table, check_exact=True)
    check_leakage(open_prepared(prepared), read_split(split), found)  # the check makes the same draw
    whole = read_features(plain).table
    np.testing.assert_allclose(found.table["mean"], whole["mean"], rtol=1e-7)  # of all cells
    assert not np.allclose(found.table["pc1"], whole["pc1"], atol=1e-6)
