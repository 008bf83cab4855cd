"""Tables that a card describes one by one are joined by name."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse
from scipy.io import mmwrite

from perturbed.data.cards import RemoteFile
from perturbed.data.raw import write_raw
from perturbed.errors import DataError

COUNTS = np.random.default_rng(0).poisson(1.0, (4, 3))
CELLS = [f"c{i}" for i in range(4)]


def described(**keys: str | None) -> list[RemoteFile]:
    return [RemoteFile(name=f"{role}.x", urls=("https://x.org/x",), role=role, key=key) for role, key in keys.items()]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    mmwrite(tmp_path / "counts.mtx", sparse.coo_matrix(COUNTS.T), field="integer")
    (tmp_path / "counts.mtx").rename(tmp_path / "by_cell.txt")
    (tmp_path / "rows").write_text("ENS0\tENS0\nENS1\tENS1\nENS2\tENS2\n")
    (tmp_path / "genes.csv").write_text("id,gene_short_name\nENS0,a\nENS1,NA\nENS2,c\n")
    (tmp_path / "cols").write_text("".join(f"{cell}\n" for cell in CELLS))
    (tmp_path / "design.tsv").write_text("Individual\tAssay\tFactor Value[a/b]\nm1\tc3\tx\nm2\tc0\ty\nm3\tc2\tx\n")
    return {path.name: path for path in tmp_path.iterdir()}


def read(files: dict[str, Path], names: list[str], roles: list[RemoteFile], tmp_path: Path) -> anndata.AnnData:
    write_raw([files[name] for name in names], tmp_path / "raw.h5ad", "{}", "set", roles)
    return anndata.read_h5ad(tmp_path / "raw.h5ad")


def test_an_annotation_in_another_order_is_joined_by_its_key(files, tmp_path):
    roles = described(matrix=None, genes=None, cells=None, annotation="Assay")
    raw = read(files, ["by_cell.txt", "rows", "cols", "design.tsv"], roles, tmp_path)
    np.testing.assert_array_equal(raw.X.toarray(), COUNTS)
    assert list(raw.obs_names) == CELLS and list(raw.var_names) == ["ENS0", "ENS1", "ENS2"]
    individual = raw.obs["Individual"].astype(object)
    assert individual[individual.notna()].to_dict() == {"c0": "m2", "c2": "m3", "c3": "m1"}
    assert "Factor Value[a_b]" in raw.obs


def test_tables_with_headers_are_read_by_their_key(files, tmp_path):
    cells = tmp_path / "annotation.csv"
    cells.write_text(
        "n,cell,passed\n" + "".join(f"{i},{cell},{'TRUE' if i else 'FALSE'}\n" for i, cell in enumerate(CELLS))
    )
    roles = described(matrix=None, genes="id", cells="cell")
    raw = read(files | {"cells": cells}, ["by_cell.txt", "genes.csv", "cells"], roles, tmp_path)
    assert list(raw.obs_names) == CELLS and list(raw.obs["n"]) == [0, 1, 2, 3]
    assert list(raw.obs["passed"].astype(str)) == ["False", "True", "True", "True"]  # what keys.drop sees
    assert raw.var["gene_short_name"].astype(object).iloc[0] == "a"


THREE = {"matrix": None, "genes": None, "cells": None}
WRONG = [
    ("by_cell.txt rows cols other", THREE | {"annotation": "Assay"}, "names none of the matrix's cells.*'z0' .*'c0'"),
    ("by_cell.txt rows cols design.tsv", THREE | {"annotation": "Asay"}, "no column 'Asay'; did you mean 'Assay'"),
    ("by_cell.txt rows", {"matrix": None, "genes": None}, "role of its own; cells"),
    ("by_cell.txt cols rows", THREE, "do not belong together"),
    ("by_cell.txt rows twice", THREE, "'c0' stands in two rows"),
    ("cols rows cols", THREE, "cannot be read"),
]


@pytest.mark.parametrize(("names", "roles", "message"), WRONG)
def test_what_does_not_fit_is_told_in_one_line(files, tmp_path, names, roles, message):
    (tmp_path / "other").write_text("Assay\tx\nz0\t1\n")
    (tmp_path / "twice").write_text("c0\nc0\nc1\nc2\n")
    files = files | {name: tmp_path / name for name in ("other", "twice")}
    with pytest.raises(DataError, match=message) as error:
        read(files, names.split(), described(**roles), tmp_path)
    assert "\n" not in str(error.value)
