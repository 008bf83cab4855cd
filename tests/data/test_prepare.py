from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy import sparse

from data_world import card, make_counts, make_prepared, write_raw
from perturbed.data.contracts import check_prepared, open_prepared, read_prepared, write_h5ad
from perturbed.data.matrices import column_counts, column_moments, read_rows, row_blocks, row_sums, to_csr
from perturbed.data.prepare import prepare
from perturbed.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LOGGED = {"keys": {"counts": None}, "prepare": {"normalise": "none"}}


def reference(adata: anndata.AnnData, target_sum: float = 1e4) -> np.ndarray:
    """scanpy's own normalisation."""
    copy = adata.copy()
    scanpy.pp.normalize_total(copy, target_sum=target_sum)
    scanpy.pp.log1p(copy)
    return copy.X.toarray()


def test_values_are_those_of_scanpy(tmp_path):
    raw = make_counts()
    found = prepare(write_raw(tmp_path, raw), card(), "world")
    check_prepared(found, "here")
    assert found.X.dtype == np.float32 and isinstance(found.X, sparse.csr_matrix)
    np.testing.assert_allclose(found.X.toarray(), reference(raw), rtol=1e-5)
    assert (found.layers["counts"] != raw.X).nnz == 0
    assert np.shares_memory(found.X.indices, found.layers["counts"].indices)
    assert found.uns["perturbed"]["values"] == "counts" and found.uns["perturbed"]["target_sum"] == 1e4
    assert list(found.obs_names) == list(raw.obs_names) and set(found.obs["context"]) == {"all"}
    assert list(found.obs["perturbation"]) == list(raw.obs["perturbation"])
    assert (
        found.obs["n_perturbed"] == [0 if p == "control" else p.count("+") + 1 for p in raw.obs["perturbation"]]
    ).all()


@pytest.mark.parametrize("layout", ["dense", "csc", "int64", "zeros", "unsorted"])
def test_layout_does_not_matter(tmp_path, layout):
    raw = make_counts()
    expected = prepare(write_raw(tmp_path, raw), card(), "world")
    other = raw.copy()
    if layout == "dense":
        other.X = raw.X.toarray()
    elif layout == "csc":
        other.X = raw.X.tocsc()
    elif layout == "int64":
        other.X = raw.X.astype(np.int64)
    elif layout == "zeros":
        other.X.data[:5] = 0
        raw.X.data[:5] = 0
        expected = prepare(write_raw(tmp_path, raw), card(), "world")
    else:
        flipped = [slice(a, b) for a, b in zip(raw.X.indptr, raw.X.indptr[1:])]
        order = np.concatenate([np.arange(s.start, s.stop)[::-1] for s in flipped])
        other.X = sparse.csr_matrix((raw.X.data[order], raw.X.indices[order], raw.X.indptr), shape=raw.shape)
    found = prepare(write_raw(tmp_path, other), card(), "world")
    assert (found.X != expected.X).nnz == 0 and found.X.indices.dtype == np.int32
    assert (found.layers["counts"].data != 0).all()


def test_same_input_gives_the_same_bytes(tmp_path):
    raw = write_raw(tmp_path, make_counts())
    for name in ("one", "two"):
        write_h5ad(tmp_path / f"{name}.h5ad", prepare(raw, card(), "world"))
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()


def test_a_cell_depends_on_itself_alone(tmp_path):
    raw = make_counts()
    expected = prepare(write_raw(tmp_path, raw), card(), "world")
    changed = raw.copy()
    changed.X = sparse.csr_matrix(sparse.vstack([raw.X[:50], raw.X[50:] * 3]))
    found = prepare(write_raw(tmp_path, changed), card(), "world")
    assert (found.X[:50] != expected.X[:50]).nnz == 0
    assert (found.layers["counts"][50:] != expected.layers["counts"][50:]).nnz > 0


def test_logged_values_without_counts(tmp_path):
    raw = make_counts()
    raw.X = sparse.csr_matrix(np.log1p(raw.X.toarray() / 3))
    found = prepare(write_raw(tmp_path, raw), card(**LOGGED), "world")
    assert (found.X != raw.X).nnz == 0 and "counts" not in found.layers
    assert found.uns["perturbed"]["values"] == "log1p"


def test_logged_values_with_a_layer_of_counts(tmp_path):
    raw = make_counts()
    raw.layers["umi"] = raw.X.copy()
    raw.X = sparse.csr_matrix(np.log1p(raw.X.toarray() / 3))
    found = prepare(write_raw(tmp_path, raw), card(keys={"counts": "umi"}, prepare={"normalise": "none"}), "world")
    assert (found.X != raw.X).nnz == 0 and (found.layers["counts"] != raw.layers["umi"]).nnz == 0


def test_quality_control(tmp_path):
    raw = make_counts(n_genes=60)
    raw.var_names = [*raw.var_names[:-4], "MT-1", "mt-2", "MT-3", "MTOR"]
    dense = raw.X.toarray()
    total, genes, mito = dense.sum(1), (dense > 0).sum(1), dense[:, -4:-1].sum(1)
    spec = {"min_counts": int(np.quantile(total, 0.1)), "min_genes": int(np.quantile(genes, 0.2))}
    spec |= {"max_mito": float(np.quantile(mito / total, 0.9)), "min_cells_per_perturbation": 8}
    spec |= {"max_genes": int(np.quantile(genes, 0.9))}
    keep = (total >= spec["min_counts"]) & (genes >= spec["min_genes"]) & (mito / total <= spec["max_mito"])
    assert (genes[keep] > spec["max_genes"]).any()
    keep &= genes <= spec["max_genes"]
    sizes = raw.obs["perturbation"][keep].value_counts()
    few = [name for name in sizes.index if sizes[name] < 8 and name != "control"]
    keep &= ~raw.obs["perturbation"].isin(few).to_numpy()
    assert few and not keep.all()
    found = prepare(write_raw(tmp_path, raw), card(prepare=spec), "world")
    assert list(found.obs_names) == list(raw.obs_names[keep])
    np.testing.assert_allclose(found.X.toarray(), reference(raw)[keep], rtol=1e-5)
    dropped = json.loads(found.uns["perturbed"]["dropped"])
    assert set(dropped["min_cells_per_perturbation"]) == set(few)
    assert dropped["min_counts"] == int((total < spec["min_counts"]).sum())
    assert dropped["max_genes"] == int((genes > spec["max_genes"]).sum())


def test_rare_genes_go_but_depth_stays(tmp_path):
    raw = make_counts()
    seen = (raw.X.toarray() > 0).sum(0)
    limit = int(np.median(seen))
    found = prepare(write_raw(tmp_path, raw), card(prepare={"min_cells_per_gene": limit}), "world")
    assert list(found.var_names) == list(raw.var_names[seen >= limit]) and found.n_vars < raw.n_vars
    np.testing.assert_allclose(found.X.toarray(), reference(raw)[:, seen >= limit], rtol=1e-5)


def test_features_that_are_no_genes_do_not_count(tmp_path):
    raw = make_counts()
    raw.var_names = [*raw.var_names[:-2], "guide_A", "guide_B"]
    raw.X = sparse.csr_matrix(raw.X + sparse.csr_matrix(np.eye(1, raw.n_vars).repeat(raw.n_obs, 0)))
    found = prepare(write_raw(tmp_path, raw), card(keys={"drop_genes": "guide_.*"}), "world")
    np.testing.assert_allclose(found.X.toarray(), reference(raw[:, :-2].copy()), rtol=1e-5)


def test_cells_are_dropped_by_value_and_pattern(tmp_path):
    raw = make_counts()
    raw.obs["guide"] = [f"{p}__{i % 3}" if i % 7 else None for i, p in enumerate(raw.obs["perturbation"])]
    keys = {"drop": {"perturbation": "A", "guide": ""}, "drop_matching": {"guide": [r"B.*__1", "nothing"]}}
    found = prepare(write_raw(tmp_path, raw), card(keys=keys), "world")
    guide = raw.obs["guide"].fillna("")
    gone = (raw.obs["perturbation"] == "A") | (guide == "") | (guide.str.startswith("B") & guide.str.endswith("__1"))
    assert list(found.obs_names) == list(raw.obs_names[~gone])
    assert json.loads(found.uns["perturbed"]["dropped"])["keys.drop"] == gone.sum()
    with pytest.raises(DataError, match=r"keys\.drop: no cell has perturbation 'KLF'"):
        prepare(tmp_path / "raw.h5ad", card(keys={"drop": {"perturbation": "KLF"}}), "world")


@pytest.mark.parametrize("missing", [None, "nan"])
@pytest.mark.parametrize("spelt", ["", "nan"])
def test_cells_without_a_label_are_dropped(tmp_path, missing, spelt):
    raw = make_counts()
    labels = raw.obs["perturbation"].astype(object).to_numpy()
    labels[:3] = missing
    raw.obs["perturbation"] = labels
    gone = {None: 3, "nan": 3 * (spelt == "nan")}[missing]
    found = prepare(write_raw(tmp_path, raw), card(keys={"drop": {"perturbation": spelt}}), "world")
    assert found.n_obs == raw.n_obs - gone


def test_context_and_kept_columns(tmp_path):
    raw = make_counts(contexts=("T", "B"))
    raw.obs["donor"] = ["x" if i % 5 else None for i in range(raw.n_obs)]
    keys = {"context": "context", "keep": {"batch": "batch", "person": "donor"}}
    found = read_prepared(make_prepared(tmp_path, raw, keys=keys))
    assert list(found.obs["context"]) == list(raw.obs["context"])
    assert list(found.obs["batch"]) == list(raw.obs["batch"])
    assert found.obs["person"].isna().sum() == raw.obs["donor"].isna().sum()
    for keep, message in (({"context": "batch"}, "name of ours"), ({"lane": "bacth"}, "did you mean 'batch'")):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "raw.h5ad", card(keys={"keep": keep}), "world")


def test_gene_names_from_symbols_and_ids(tmp_path):
    raw = make_counts()
    raw.var["ens"] = [f"ENS{i}" for i in range(raw.n_vars)]
    raw.var["name"] = ["A", "A", None, *raw.var_names[3:]]
    found = prepare(write_raw(tmp_path, raw), card(keys={"symbol": "name", "gene_id": "ens"}), "world")
    assert list(found.var_names[:4]) == ["A-ENS0", "A-ENS1", "ENS2", raw.var_names[3]]
    assert list(found.var["symbol"][:2]) == ["A", "A"] and list(found.var["gene_id"][:2]) == ["ENS0", "ENS1"]
    assert json.loads(found.uns["perturbed"]["renamed_genes"]) == {"A-ENS0": "A", "A-ENS1": "A"}
    raw.var["ens"] = "same"
    with pytest.raises(DataError, match=r"gene name\(s\) repeat, such as 'A-same'.*keys\.gene_id"):
        prepare(write_raw(tmp_path, raw), card(keys={"symbol": "name", "gene_id": "ens"}), "world")


def test_provenance_is_carried(tmp_path):
    raw = make_counts()
    raw.uns["provenance"] = {"url": "there", "n": np.int64(3)}
    found = prepare(write_raw(tmp_path, raw), card(), "world")
    assert json.loads(found.uns["perturbed"]["provenance"]) == {"url": "there", "n": 3}


# --- expectations -----------------------------------------------------------------------------------------------------


def test_expectations_of_both_stages(tmp_path):
    raw = make_counts()
    path, n_single = write_raw(tmp_path, raw), 6
    labels = {"n_control": 20, "n_groups": 12, "n_single": n_single, "n_double": 5}
    as_read = {**labels, "n_obs": raw.n_obs, "n_vars": 50, "values": "counts", "x_sum": float(raw.X.sum())}
    prepare(path, card(expect=as_read), "world")
    for key in ("n_obs", "n_vars", "n_control", "n_groups", "n_single", "n_double", "x_sum"):
        with pytest.raises(DataError, match=f"{key} is .* but the card expects"):
            prepare(path, card(expect={**as_read, key: as_read[key] + 1}), "world")
    keys = {"drop": {"perturbation": "A"}}
    prepare(path, card(keys=keys, expect={**as_read, "n_groups": 11, "n_single": 5}), "world")
    after = {"n_obs": raw.n_obs - 12, "n_groups": 11, "n_single": 5, "n_vars": 50, "stage": "prepared"}
    prepare(path, card(keys=keys, expect=after), "world")
    with pytest.raises(DataError, match="prepared: n_obs is"):
        prepare(path, card(expect=after), "world")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (-1.0, "1 negative"), (0.5, "1 fractional")]
)
@pytest.mark.parametrize("dense", [False, True])
def test_bad_values_are_named(tmp_path, value, word, dense):
    raw = make_counts()
    X = raw.X.toarray()
    X[7, 3] = value
    raw.X = X if dense else sparse.csr_matrix(X)
    message = (
        rf"raw\.h5ad: X holds {word} value\(s\), the first in cell '{raw.obs_names[7]}', gene '{raw.var_names[3]}'"
    )
    with pytest.raises(DataError, match=message):
        prepare(write_raw(tmp_path, raw), card(), "world")


def test_logged_values_declared_as_counts(tmp_path):
    raw = make_counts()
    raw.X = sparse.csr_matrix(np.log1p(raw.X.toarray()))
    with pytest.raises(DataError, match=r"no counts; set keys\.counts: null and prepare\.normalise: none"):
        prepare(write_raw(tmp_path, raw), card(), "world")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (LOGGED, "X holds whole numbers only"),
        ({"keys": {"counts": None}}, "nothing to normalise"),
        ({"prepare": {"normalise": "none"}}, "says X holds counts"),
        ({"keys": {"counts": "umis"}}, r"keys\.counts: no layer 'umis'"),
        ({"keys": {"perturbation": "perturbatoin"}}, "did you mean 'perturbation'"),
        ({"keys": {"context": "cell_line"}}, r"keys\.context: no obs column 'cell_line'"),
        ({"keys": {"symbol": "name"}}, r"keys\.symbol: no var column 'name'"),
        ({"keys": {"control": "NT"}}, r"label 'control' holds 'control', the name of controls"),
        ({"prepare": {"min_counts": 10**6}}, r"no cell passes quality control .*prepare"),
        ({"prepare": {"max_mito": 0.1}}, "no gene symbol starts with MT-"),
    ],
)
def test_wrong_cards_are_refused(tmp_path, sections, message):
    with pytest.raises(DataError, match=message):
        prepare(write_raw(tmp_path, make_counts()), card(**sections), "world")


def test_data_without_controls(tmp_path):
    raw = make_counts(conditions=("A", "B"))
    with pytest.raises(DataError, match=r"no control cells: no label .* keys\.control \['control'\].*'A'"):
        prepare(write_raw(tmp_path, raw), card(), "world")


def test_contexts_without_controls_are_named(tmp_path):
    raw = make_counts(contexts=("T", "B"))
    raw = raw[(raw.obs["context"] != "B") | (raw.obs["perturbation"] != "control")].copy()
    with pytest.raises(DataError, match=r"1 context\(s\) have perturbed cells but no control cells: 'B'"):
        prepare(write_raw(tmp_path, raw), card(keys={"context": "context"}), "world")


def test_controls_lost_in_quality_control(tmp_path):
    raw = make_counts()
    X = raw.X.toarray()
    X[(raw.obs["perturbation"] == "control").to_numpy()] = np.eye(1, raw.n_vars)
    raw.X = sparse.csr_matrix(X)
    with pytest.raises(DataError, match="no control cell passes quality control"):
        prepare(write_raw(tmp_path, raw), card(prepare={"min_counts": 5}), "world")


def test_empty_cells_need_a_threshold(tmp_path):
    raw = make_counts()
    X = raw.X.toarray()
    X[3] = 0
    raw.X = sparse.csr_matrix(X)
    path = write_raw(tmp_path, raw)
    with pytest.raises(DataError, match=r"1 cells hold no counts.*prepare\.min_counts: 1"):
        prepare(path, card(), "world")
    assert prepare(path, card(prepare={"min_counts": 1}), "world").n_obs == raw.n_obs - 1


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize("axis", ["cell", "gene"])
def test_duplicate_names_are_refused(tmp_path, axis):
    raw = make_counts()
    if axis == "cell":
        raw.obs_names = ["twice", "twice", *raw.obs_names[2:]]
    else:
        raw.var_names = ["twice", "twice", *raw.var_names[2:]]
    with pytest.raises(DataError, match=rf"1 {axis} name\(s\) repeat, such as 'twice'"):
        prepare(write_raw(tmp_path, raw), card(), "world")


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path / "absent.h5ad", card(), "world")
    path = write_raw(tmp_path, make_counts())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"not a readable h5ad .*truncated"):
        prepare(path, card(), "world")


def test_condition_with_one_cell_is_kept(tmp_path):
    raw = make_counts()
    others = np.flatnonzero(raw.obs["perturbation"] == "A")[1:]
    raw = raw[np.setdiff1d(np.arange(raw.n_obs), others)].copy()
    found = prepare(write_raw(tmp_path, raw), card(), "world")
    assert (found.obs["perturbation"] == "A").sum() == 1


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("perturbed.data.matrices._BLOCK", 40)


@pytest.mark.parametrize("seed", range(3))
def test_sums_by_blocks(small_blocks, seed):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.7, size=(57, 23)).astype(np.float32)
    dense[[0, 10, 56]] = 0
    matrix = to_csr(dense)
    assert (matrix.toarray() == dense).all()
    spans = list(row_blocks(matrix))
    assert len(spans) > 3 and spans[0].start == 0 and spans[-1].stop == 57
    assert all(a.stop == b.start for a, b in pairwise(spans))
    np.testing.assert_allclose(row_sums(matrix), dense.sum(1))
    np.testing.assert_allclose(row_sums(matrix, np.arange(23) < 5), dense[:, :5].sum(1))
    np.testing.assert_array_equal(column_counts(matrix), (dense > 0).sum(0))
    for expm1, values in ((False, dense.astype(float)), (True, np.expm1(dense.astype(float)))):
        mean, variance = column_moments(matrix, expm1=expm1)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(variance, values.var(0), rtol=1e-10)


def test_rows_on_disk(tmp_path, monkeypatch):
    adata = read_prepared(make_prepared(tmp_path))
    backed = open_prepared(tmp_path / "prepared.h5ad")
    rng = np.random.default_rng(0)
    for n, block in product((0, 1, 40, adata.n_obs), (50, 10**6)):
        monkeypatch.setattr("perturbed.data.matrices._BLOCK", block)
        rows = np.sort(rng.choice(adata.n_obs, n, replace=False))
        assert (read_rows(backed.X, rows) != adata.X[rows]).nnz == 0
    backed.X.group.file.close()


@pytest.mark.parametrize(("gap", "read"), [(0, [0, 1, 5, 6, 7, 30]), (10**6, range(31))])
def test_only_the_rows_asked_for_and_near_ones_are_read(tmp_path, monkeypatch, gap, read):
    path = make_prepared(tmp_path)
    monkeypatch.setattr("perturbed.data.matrices._GAP", gap)
    rows = np.array([0, 1, 5, 6, 7, 30])

    class Spy:
        def __init__(self, dataset):
            self.dataset, self.dtype, self.seen = dataset, dataset.dtype, []

        def read_direct(self, out, source, place):
            self.seen += range(source.start, source.stop)
            self.dataset.read_direct(out, source, place)

        def __getitem__(self, source):
            self.seen += range(source.start, source.stop)
            return self.dataset[source]

    class Matrix:
        format = "csr"

        def __init__(self, backed):
            self.shape = backed.shape
            self.group = {key: backed.group[key] for key in ("indptr", "data", "indices")}
            self.group["data"], self.group["indices"] = Spy(self.group["data"]), Spy(self.group["indices"])

    backed = open_prepared(path)
    matrix, indptr = Matrix(backed.X), backed.X.group["indptr"][:]
    found = read_rows(matrix, rows)
    assert (found != read_prepared(path).X[rows]).nnz == 0
    expected = [i for row in read for i in range(indptr[row], indptr[row + 1])]
    assert matrix.group["data"].seen == matrix.group["indices"].seen == expected
    backed.X.group.file.close()


# --- real cells -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_norman_combo1000():
    keys = {"perturbation": "condition", "counts": None}
    expect = {"n_obs": 5600, "n_vars": 1000, "n_control": 40, "n_groups": 140, "n_single": 101, "n_double": 38}
    sections = {"keys": keys, "prepare": {"normalise": "none", "upstream_genes": True}, "expect": expect}
    path = SHARED / "norman2019_combo1000.h5ad"
    found = prepare(path, card(**sections), "norman2019_combo1000")
    source = anndata.read_h5ad(path)
    assert (found.X != source.X).nnz == 0 and found.uns["perturbed"]["upstream_genes"]
    assert (found.obs["n_perturbed"].to_numpy() == source.obs["n_perturbed_genes"].to_numpy()).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_norman_hvg500_has_counts():
    keys = {"perturbation": "condition", "counts": "counts", "delimiter": "+", "filler": ["control", "ctrl"]}
    found = prepare(SHARED / "norman2019_hvg500.h5ad", card(keys=keys, prepare={"min_counts": 1}), "norman2019_hvg500")
    sizes = pd.Series(found.obs["perturbation"].unique()).map(lambda p: 0 if p == "control" else p.count("+") + 1)
    assert sizes.value_counts().to_dict() == {0: 1, 1: 18, 2: 15}
