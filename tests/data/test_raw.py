"""raw.h5ad says what the source says, and expectations are noticed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from perturbed.data.cards import Card, Expectations
from perturbed.data.raw import check_expectations, check_h5ad, check_raw, kind_of_values, write_raw
from perturbed.errors import DataError

COUNTS = np.random.default_rng(1).poisson(0.7, (7, 5)).astype(np.float32)
FORMATS = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}


def write(path: Path, matrix: Any, **layers: Any) -> Path:
    obs = pd.DataFrame({"label": list("aabbccc")}, index=[f"c{i}" for i in range(7)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(5)])
    anndata.AnnData(matrix, obs=obs, var=var, layers=layers).write_h5ad(path)
    return path


def card(**sections: Any) -> Card:
    return Card.model_validate({"source": {"kind": "path", "path": "x.h5ad"}, **sections})


@pytest.mark.parametrize("name", FORMATS)
def test_values_and_storage_stay(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "x.h5ad", FORMATS[name](COUNTS))
    write_raw([source], tmp_path / "raw.h5ad", json.dumps({"dataset": "x"}), "x")
    raw = anndata.read_h5ad(tmp_path / "raw.h5ad")
    assert type(raw.X) is type(FORMATS[name](COUNTS))
    np.testing.assert_array_equal(raw.X if name == "dense" else raw.X.toarray(), COUNTS)
    assert json.loads(raw.uns["provenance"]) == {"dataset": "x"}
    with h5py.File(source) as one, h5py.File(tmp_path / "raw.h5ad") as two:
        assert sorted(one) == sorted(two)
        assert "provenance" not in one["uns"]


def test_source_without_uns(tmp_path: Path) -> None:
    source = write(tmp_path / "x.h5ad", COUNTS)
    with h5py.File(source, "r+") as file:
        del file["uns"]
    write_raw([source], tmp_path / "raw.h5ad", "{}", "x")
    assert anndata.read_h5ad(tmp_path / "raw.h5ad").uns["provenance"] == "{}"


def test_raw_of_a_raw_keeps_one_source_record(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad", COUNTS)
    for i in range(3):
        write_raw([path], tmp_path / f"{i}.h5ad", str(i), "x")
        path = tmp_path / f"{i}.h5ad"
    uns = anndata.read_h5ad(path).uns
    assert (uns["provenance"], uns["source_provenance"]) == ("2", "1")


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.h5ad", COUNTS).read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.h5ad").write_text("<html>Forbidden</html>")
    for name in ("cut", "page"):
        with pytest.raises(DataError, match=rf"x: .*{name}.h5ad: not a readable h5ad") as error:
            check_h5ad(tmp_path / f"{name}.h5ad", "x")
        assert "\n" not in str(error.value)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["X"] = COUNTS
    with pytest.raises(DataError, match="holds no obs"):
        check_h5ad(tmp_path / "other.h5ad", "x")


def test_old_sparse_encoding_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad", sparse.csr_matrix(COUNTS))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["h5sparse_shape"] = COUNTS.shape
    with pytest.raises(DataError, match="h5sparse"):
        check_h5ad(path, "x")


# --- Matrix Market ------------------------------------------------------------------------------------------------


@pytest.fixture
def triple(tmp_path: Path) -> list[Path]:
    mmwrite(tmp_path / "s_matrix.mtx", sparse.coo_matrix(COUNTS.T.astype(int)), field="integer")
    (tmp_path / "s_matrix.mtx.gz").write_bytes(gzip.compress((tmp_path / "s_matrix.mtx").read_bytes()))
    (tmp_path / "s_genes.tsv").write_text("".join(f"ENSG{i}\tNA{i}\n" for i in range(4)) + "ENSG4\tNA\n")
    (tmp_path / "s_barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"c{i}\n" for i in range(7)).encode()))
    return [tmp_path / name for name in ("s_matrix.mtx.gz", "s_genes.tsv", "s_barcodes.tsv.gz")]


def test_matrix_market(triple: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "s_cell_identities.csv"
    table.write_text("barcode,guide\nc6,z\nc0,a\nc3,b\n")  # other order, not all
    write_raw([*triple, table], tmp_path / "raw.h5ad", "{}", "x")
    raw = anndata.read_h5ad(tmp_path / "raw.h5ad")
    assert sparse.issparse(raw.X)
    np.testing.assert_array_equal(raw.X.toarray(), COUNTS)
    assert list(raw.var_names) == [f"ENSG{i}" for i in range(5)]
    assert list(raw.var["symbol"]) == ["NA0", "NA1", "NA2", "NA3", "NA"]
    guides = raw.obs["guide"].astype(object)
    assert guides[guides.notna()].to_dict() == {"c0": "a", "c3": "b", "c6": "z"}


def test_matrix_market_that_does_not_fit(triple: list[Path], tmp_path: Path) -> None:
    triple[1].write_text("ENSG0\tA\n")
    with pytest.raises(DataError, match="do not belong together"):
        write_raw(triple, tmp_path / "raw.h5ad", "{}", "x")
    with pytest.raises(DataError, match="no file with genes or features in the name"):
        write_raw([triple[0], triple[2]], tmp_path / "raw.h5ad", "{}", "x")
    triple[0].write_bytes(gzip.compress(b"%%MatrixMarket nonsense\n"))
    with pytest.raises(DataError, match="cannot be read"):
        write_raw(triple, tmp_path / "raw.h5ad", "{}", "x")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source\.files: x\.rds: give one h5ad"):
        write_raw([tmp_path / "x.rds"], tmp_path / "raw.h5ad", "{}", "x")


# --- expectations -------------------------------------------------------------------------------------------------


LOGGED = np.log1p(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 1e4)
KINDS = {
    "counts": COUNTS,
    "log1p": LOGGED,
    "negative": COUNTS - 1,
    "not finite": np.where(COUNTS > 1, np.nan, COUNTS),
    "neither": COUNTS * 40.5,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_values(kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbed.data.raw.BLOCK", 6)  # several blocks
    path = write(tmp_path / "x.h5ad", FORMATS[form](KINDS[kind].astype(np.float32)))
    with h5py.File(path) as file:
        assert kind_of_values(file["X"]).startswith(kind)


def test_check_raw_looks_where_the_card_says(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad", sparse.csr_matrix(LOGGED), counts=sparse.csr_matrix(COUNTS))
    total = float(COUNTS.sum())
    right = {"n_obs": 7, "n_vars": 5, "values": "counts", "x_sum": total, "n_control": 99}
    check_raw(path, card(keys={"counts": "counts"}, expect=right), "x")
    logged = {"values": "log1p", "x_sum": float(LOGGED.sum(dtype=np.float64))}
    check_raw(path, card(keys={"counts": None}, expect=logged), "x")
    check_raw(path, card(expect={"n_obs": 3, "n_vars": 2, "x_sum": 1, "stage": "prepared"}), "x")
    with pytest.raises(DataError, match="no layer 'umi'; the file has: counts"):
        check_raw(path, card(keys={"counts": "umi"}), "x")
    wrong = {"n_obs": 8, "n_vars": 5, "values": "counts", "x_sum": total + 1}
    with pytest.raises(DataError, match=rf"x: .*x.h5ad: n_obs is 7 but .* 8; x_sum is {total}") as error:
        check_raw(path, card(keys={"counts": "counts"}, expect=wrong), "x")
    assert "n_vars" not in str(error.value)
    assert "\n" not in str(error.value)


def test_check_expectations() -> None:
    expect = Expectations(n_obs=10, n_control=3, x_sum=1e9, values="counts")
    check_expectations({"n_obs": 10, "n_control": 3, "n_groups": 5, "x_sum": 1e9 + 1, "values": "counts"}, expect, "x")
    with pytest.raises(DataError, match="x_sum is"):
        check_expectations({"x_sum": 1e9 + 1e4}, expect, "x")
    with pytest.raises(DataError, match="n_obs is 11 but the card expects 10; n_control is 0 but the card expects 3"):
        check_expectations({"n_obs": 11, "n_control": 0}, expect, "x")
    with pytest.raises(ValueError, match="no such expectation: n_cells"):
        check_expectations({"n_cells": 1}, expect, "x")


def test_memory_of_a_large_file_stays_small(tmp_path: Path) -> None:
    """A matrix of 200 MB passes through a few MB of memory."""
    import tracemalloc

    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file.create_dataset("X", (50_000, 1_000), dtype=np.float32, chunks=(1_000, 1_000), compression="lzf")
        file.create_group("obs")
        file.create_group("var")
    tracemalloc.start()
    write_raw([tmp_path / "x.h5ad"], tmp_path / "raw.h5ad", "{}", "x")
    check_raw(tmp_path / "raw.h5ad", card(expect={"n_obs": 50_000, "values": "counts", "x_sum": 0}), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6
