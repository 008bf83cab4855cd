"""`prepared.h5ad` for stages that only read it: tables in memory, matrices on disk, without importing anndata.

Importing anndata takes longer than fitting a baseline, and a run starts hundreds of fits. What is read is the published
on-disk format of AnnData; a column in an encoding that is rare here is left to anndata itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from perturbed.errors import DataError

_REQUIRED = {"obs": ("perturbation", "n_perturbed", "context"), "var": ("gene_id", "symbol")}


@dataclass(frozen=True)
class MatrixOnDisk:
    """A CSR matrix in an open file; `perturbed.data.matrices.read_rows` reads rows of it."""

    group: h5py.Group
    """`data`, `indices` and `indptr`."""

    @property
    def format(self) -> str:
        """`csr` or `csc`."""
        return str(self.group.attrs.get("encoding-type", "")).removesuffix("_matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.group.attrs["shape"]
        return int(rows), int(columns)


@dataclass(frozen=True)
class PreparedOnDisk:
    """The parts of `prepared.h5ad`."""

    obs: pd.DataFrame
    var: pd.DataFrame
    X: MatrixOnDisk
    layers: Mapping[str, MatrixOnDisk]


def open_tables(path: str | Path) -> PreparedOnDisk:
    """Open `prepared.h5ad` and check its tables as `perturbed.data.contracts.check_prepared` does.

    Raises
    ------
    DataError
        If the file is missing, truncated, no h5ad or not prepared.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed prepare`, or correct the path")
    try:
        file = h5py.File(path, "r")
        obs, var = _read_frame(file["obs"]), _read_frame(file["var"])
        layers = {name: MatrixOnDisk(group) for name, group in file.get("layers", {}).items()}
        found = PreparedOnDisk(obs, var, MatrixOnDisk(file["X"]), layers)
        prepared = "uns" in file and "perturbed" in file["uns"]
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable h5ad ({reason}); it may be truncated, delete it and rerun") from None
    tables = {"obs": obs, "var": var}
    problems = [
        f"{table}[{key!r}] is missing" for table, keys in _REQUIRED.items() for key in keys if key not in tables[table]
    ]
    problems += ["cell names repeat"] * (not obs.index.is_unique) + ["gene names repeat"] * (not var.index.is_unique)
    problems += ["uns['perturbed'] is missing"] * (not prepared)
    if problems:
        raise DataError(f"{path}: not a prepared file: {', '.join(problems)}; make it with `perturbed prepare`")
    return found


def _read_frame(group: h5py.Group) -> pd.DataFrame:
    index = group.attrs["_index"]
    columns = {name: _read_column(group[name]) for name in group.attrs["column-order"]}
    return pd.DataFrame(columns, index=pd.Index(_read_column(group[index]), name=None if index == "_index" else index))


def _read_column(element: Any) -> Any:
    encoding = element.attrs.get("encoding-type")
    if encoding == "string-array":
        return element.asstr()[:]
    if encoding == "array":
        return element[:]
    if encoding == "categorical":
        categories, codes = _read_column(element["categories"]), np.asarray(element["codes"][:])
        return pd.Categorical.from_codes(codes, categories, ordered=bool(element.attrs["ordered"]))
    from anndata.io import read_elem

    return read_elem(element)
