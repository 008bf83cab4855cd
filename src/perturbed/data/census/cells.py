"""`cells.h5ad`: counts by Ensembl id, the batch of the published models, and where the cells come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.census.filters import values_of
from perturbed.data.census.spec import BATCH, CensusCard, CensusExpectations
from perturbed.data.download import write_problem
from perturbed.errors import DataError, FetchError, suggest
from perturbed.files import atomic

if TYPE_CHECKING:
    from anndata import AnnData

COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
_H5_CHUNK = 1 << 18
"""Values of one chunk of the file."""


def add_batch(obs: pd.DataFrame, where: str) -> pd.DataFrame:
    """`obs` with `batch`: the values of `perturbed.data.census.spec.BATCH`, joined without a separator.

    Raises
    ------
    DataError
        If one of the columns is missing.
    """
    missing = [name for name in BATCH if name not in obs]
    if missing:
        raise DataError(f"{where}: obs has no column {missing[0]!r}, which the batch is made of")
    parts = [obs[name].astype(str).to_numpy(dtype=object) for name in BATCH]
    return obs.assign(batch=sum(parts[1:], parts[0]))


def tidy(obs: pd.DataFrame) -> pd.DataFrame:
    """Text as categories in alphabetical order, none of them unused, so that equal cells are equal bytes."""
    found = obs.copy()
    for name in found:
        kind = found[name].dtype
        if isinstance(kind, pd.CategoricalDtype) or pd.api.types.is_object_dtype(kind) or str(kind) == "string":
            found[name] = pd.Categorical(found[name].astype(str))
    return found


def check_expectations(card: CensusCard, obs: pd.DataFrame, n_vars: int, where: str) -> None:
    """Refuse cells that are not what the card expects.

    Raises
    ------
    DataError
        One line that names the key of `expect`, what it says, and what was found.
    """
    expect: CensusExpectations = card.expect
    for key, wanted, found in (("n_obs", expect.n_obs, len(obs)), ("n_vars", expect.n_vars, n_vars)):
        if wanted is not None and wanted != found:
            raise DataError(
                f"{where}: expect.{key}: the card says {wanted:,}, found {found:,}; is it the same release?"
            )
    for column, values in expect.values.items():
        if column not in obs:
            raise DataError(f"{where}: expect.values: obs has no column {column!r}; {suggest(column, map(str, obs))}")
        known = {value for joined in set(obs[column].astype(str)) for value in values_of(joined)}
        missing = sorted(set(values) - known)
        if missing:
            raise DataError(f"{where}: expect.values: no cell has {column} {missing[0]!r}; is it the same release?")


def check_counts(values: np.ndarray, where: str) -> None:
    """Refuse what is no count.

    Raises
    ------
    DataError
        One line with the first value that is none.
    """
    wrong = ~np.isfinite(values) | (values < 0) | (values != np.round(values))
    if wrong.any():
        first = values[np.flatnonzero(wrong)[0]]
        raise DataError(f"{where}: holds {first:g}, which is no count; raw counts are needed, not normalised values")


def open_cells(path: str | Path) -> AnnData:
    """`cells.h5ad` with its tables and latents in memory and its counts on disk (`perturbed.data.matrices.read_rows`).

    Raises
    ------
    DataError
        If the file is missing or broken.
    """
    import anndata

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed census query`, or correct the path")
    try:
        file = h5py.File(path, "r")
        tables = {key: anndata.io.read_elem(file[key]) for key in ("obs", "var", "uns", "obsm")}
        counts = anndata.io.sparse_dataset(file["X"]) if "X" in file and len(tables["var"]) else None
        return anndata.AnnData(X=counts, **tables)
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable h5ad ({reason}); it may be truncated, delete it and rerun") from None


def write_cells(
    out: str | Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    blocks: Iterable[sparse.csr_matrix] | None,
    provenance: Mapping[str, Any],
    obsm: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `cells.h5ad` block by block, whole or not at all.

    Parameters
    ----------
    out
        The file.
    obs, var
        Tables, indexed by cell and by Ensembl id.
    blocks
        Consecutive rows of the counts, (n_rows, n_vars) each; None where there are no counts.
    provenance
        Kept as JSON in `uns["provenance"]`.
    obsm
        Arrays by cell.

    Raises
    ------
    DataError
        If the blocks hold more or fewer rows than `obs`, or values that are no counts.
    FetchError
        If the file cannot be written.
    """
    from anndata import AnnData

    problems = [f"{table} names repeat" for table, frame in (("cell", obs), ("gene", var)) if not frame.index.is_unique]
    if problems:
        raise DataError(f"{out}: {', '.join(problems)}")
    shape = (len(obs), len(var))
    nothing = np.empty(0, dtype=np.float32), (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
    empty = None if blocks is None else sparse.csr_matrix(nothing, shape=shape)
    adata = AnnData(empty, obs=tidy(obs), var=var, shape=shape if blocks is None else None)
    adata.uns["provenance"] = json.dumps(dict(provenance), sort_keys=True)
    for key, values in (obsm or {}).items():
        adata.obsm[key] = values
    try:
        with atomic(out) as part:
            adata.write_h5ad(part, **COMPRESSION)
            if blocks is not None:
                with h5py.File(part, "r+") as file:
                    _write_blocks(file["X"], blocks, shape, str(out))
    except OSError as error:
        raise FetchError(write_problem(out, error)) from None


def _write_blocks(group: h5py.Group, blocks: Iterable[sparse.csr_matrix], shape: tuple[int, int], where: str) -> None:
    for key in ("data", "indices", "indptr"):
        del group[key]
    options: dict[str, Any] = {"maxshape": (None,), "chunks": (_H5_CHUNK,), **COMPRESSION}
    data = group.create_dataset("data", (0,), np.float32, **options)
    indices = group.create_dataset("indices", (0,), np.int32, **options)
    lengths = [np.zeros(1, dtype=np.int64)]
    n_rows = 0
    for block in blocks:
        check_counts(block.data, where)
        n_rows += block.shape[0]
        start, stop = len(data), len(data) + block.nnz
        for target, values in ((data, block.data), (indices, block.indices)):
            target.resize((stop,))
            target[start:stop] = values
        lengths.append(np.diff(block.indptr).astype(np.int64))
    if n_rows != shape[0]:
        raise DataError(f"{where}: {n_rows:,} rows of counts for {shape[0]:,} cells; run again")
    for key in ("data", "indices", "indptr"):  # as anndata marks its arrays
        if key != "indptr":
            group[key].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    indptr = np.cumsum(np.concatenate(lengths))
    made = group.create_dataset("indptr", data=indptr, **COMPRESSION)
    made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
