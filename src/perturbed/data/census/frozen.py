"""Cells of files that do not change: a dataset's frozen h5ad, and the minified cells beside a published model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.census.cells import add_batch, check_expectations, write_cells
from perturbed.data.census.filters import check_columns, check_values, join, select, widen
from perturbed.data.census.spec import BATCH, CensusCard, Clause, H5adCells, MinifiedCells, check_gene_id
from perturbed.data.matrices import read_rows
from perturbed.data.ondisk import MatrixOnDisk
from perturbed.errors import ConfigError, DataError, suggest
from perturbed.files import hash_file

ROWS = 4096
"""Cells read at a time."""
SLAB = 65_536
"""Rows of latents read at a time, of which those wanted are kept."""
COMPUTED = ("nnz", "raw_sum")
PRIMARY = Clause(column="is_primary_data", values=(True,))


def read_frozen(
    card: CensusCard, name: str, path: str | Path, out: str | Path, symbols: Mapping[str, str] | None = None
) -> None:
    """Take the cells of a card from its file and write `cells.h5ad`.

    The file's tables are read column by column, its matrices by blocks of rows.

    Parameters
    ----------
    card
        Of kind `h5ad` or `minified`.
    name
        Its name, for messages.
    path
        The file, fetched or local.
    out
        The `cells.h5ad` to write. From a frozen h5ad: `X` raw counts, `var` indexed by Ensembl id. From minified cells:
        no `X`, `var` with the model's genes, `obsm["qz_mean"]` and `obsm["qz_sd"]`, the posterior of the latents
        (n_cells, n_latent). `obs` holds the columns asked for, `batch` and `source_row`, the row in the file.
    symbols
        Symbols by Ensembl id, for minified cells whose file has none.

    Raises
    ------
    ConfigError
        If a column or a value of the card is not in the file.
    DataError
        If the file is broken, no cell matches, or its values are no counts.
    """
    cells, path = card.cells, Path(path)
    if not isinstance(cells, H5adCells | MinifiedCells):
        raise ConfigError(f"{name}: cells.kind is {cells.kind!r}, which is read by a query, not from a file")
    if not path.is_file():
        raise DataError(f"{name}: {path}: no such file; correct cells.local")
    try:
        with h5py.File(path, "r") as file:
            _write(file, card, cells, name, path, Path(out), symbols or {})
    except (OSError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{name}: {path}: not a readable h5ad ({reason}); delete it and run again") from None


def find_file(
    cells: H5adCells | MinifiedCells,
    name: str,
    *,
    data_dir: str | Path = "data",
    mirror: str | Path | None = None,
    allow_unpinned: bool = False,
) -> Path:
    """The file of a card: the local one, or the one on the web, fetched and checked against its hash.

    Raises
    ------
    DataError
        If the local file does not exist.
    FetchError
        If the file cannot be had, or is not the pinned one.
    """
    from perturbed.data.fetch import fetch_file

    if cells.local is not None:
        if not Path(cells.local).is_file():
            raise DataError(f"{name}: cells.local: {cells.local}: no such file (from {Path.cwd()}); correct the path")
        return Path(cells.local)
    assert cells.file is not None
    near = None if mirror is None else Path(mirror)
    return fetch_file(cells.file, Path(data_dir) / "downloads", mirror=near, allow_unpinned=allow_unpinned)


def find_symbols(
    cells: H5adCells | MinifiedCells,
    name: str,
    *,
    data_dir: str | Path = "data",
    mirror: str | Path | None = None,
    allow_unpinned: bool = False,
) -> dict[str, str]:
    """Symbols by Ensembl id from the table that a card names, fetched where it is on the web; empty without one.

    Raises
    ------
    DataError
        If the table cannot be read.
    FetchError
        If it cannot be had, or is not the pinned one.
    """
    from perturbed.pathways.gene_sets import Access, find_library
    from perturbed.pathways.identifiers import read_id_table

    if not isinstance(cells, MinifiedCells) or cells.symbols is None:
        return {}
    access = Access(Path(data_dir), None if mirror is None else Path(mirror), allow_unpinned)
    table = read_id_table(cells.symbols, find_library(cells.symbols.source, f"{name}: cells.symbols", access))
    return {gene: targets[0] for gene, targets in table.items()}


def _write(
    file: h5py.File,
    card: CensusCard,
    cells: H5adCells | MinifiedCells,
    name: str,
    path: Path,
    out: Path,
    symbols: Mapping[str, str],
) -> None:
    matrix, blocks = None, None
    if isinstance(cells, H5adCells):
        matrix, table = _counts(file, cells, f"{name}: {path}")
        var, columns = _genes(table, cells, name)
    else:
        var = _named_genes(_read(file["var"]), cells, name, symbols)
    obs, rows = _select(file["obs"], cells, matrix, name)
    check_expectations(card, obs, len(var), name)
    obsm = {}
    if isinstance(cells, MinifiedCells):
        mean, variance = (_latents(file, key, rows, f"{name}: {path}") for key in (cells.qzm, cells.qzv))
        if (variance < 0).any() or not np.isfinite(mean).all():
            raise DataError(f"{name}: {path}: {cells.qzv} holds negative variances, or {cells.qzm} no numbers")
        obsm = {"qz_mean": mean, "qz_sd": np.sqrt(variance)}
    else:
        assert matrix is not None
        blocks = _blocks(matrix, rows, columns)
    provenance = {
        "card": name,
        "kind": cells.kind,
        "organism": cells.organism,
        "file": {"name": path.name, "sha256": hash_file(path), "urls": list(cells.file.urls) if cells.file else []},
        "filter": join(_clauses(cells)),
        "max_cells": cells.max_cells,
        "seed": cells.seed,
        "n_cells": len(obs),
        "dataset_ids": sorted(set(obs["dataset_id"].astype(str))),
    }
    write_cells(out, obs, var, blocks, provenance, obsm)


def _clauses(cells: H5adCells | MinifiedCells) -> list[Clause]:
    return [*([PRIMARY] if cells.primary_only else []), *cells.obs_filter]


# --- which cells --------------------------------------------------------------------------------------------------


def _select(
    group: h5py.Group, cells: H5adCells | MinifiedCells, matrix: MatrixOnDisk | None, name: str
) -> tuple[pd.DataFrame, np.ndarray]:
    """Table of the cells that are kept, and their rows."""
    index_name = str(group.attrs["_index"])
    valid = list(map(str, group.attrs["column-order"]))
    dataset = cells.dataset_id if isinstance(cells, H5adCells) else None
    computed = [key for key in COMPUTED if matrix is not None and key not in valid]
    given = ["dataset_id"] if dataset is not None and "dataset_id" not in valid else []
    clauses = _clauses(cells)
    wanted = list(dict.fromkeys(["is_primary_data", *BATCH, *cells.columns]))
    check_columns(name, wanted, clauses, [*valid, *computed, *given])
    table = _read_columns(group, wanted, clauses, valid)
    if given:
        table["dataset_id"] = dataset
    if matrix is not None and set(computed) & set(wanted):
        table = table.assign(**_count(matrix, computed))
    check_values(name, clauses, lambda column: _values(table[column]))
    rows = select(table, [widen(clause, lambda column: _values(table[column])) for clause in clauses], name)
    if cells.max_cells is not None and cells.max_cells < len(rows):
        rows = np.sort(np.random.default_rng(cells.seed).choice(rows, cells.max_cells, replace=False))
    names = _read(group[index_name])
    kept = table.iloc[rows][wanted].set_index(pd.Index(np.asarray(names, dtype=object)[rows].astype(str)))
    if "soma_joinid" in valid and "soma_joinid" not in wanted:
        kept["soma_joinid"] = np.asarray(_read(group["soma_joinid"]))[rows]
    return add_batch(kept.assign(source_row=rows), name), rows


def _read_columns(
    group: h5py.Group, wanted: Sequence[str], clauses: Sequence[Clause], valid: Sequence[str]
) -> pd.DataFrame:
    names = dict.fromkeys([*wanted, *(clause.column for clause in clauses)])
    return pd.DataFrame({key: _read(group[key]) for key in names if key in valid})


def _values(column: pd.Series) -> set[str] | None:
    return set(column.cat.categories.astype(str)) if isinstance(column.dtype, pd.CategoricalDtype) else None


def _read(element: Any) -> Any:
    from anndata.io import read_elem

    return read_elem(element)


# --- counts -------------------------------------------------------------------------------------------------------


def _counts(file: h5py.File, cells: H5adCells, where: str) -> tuple[MatrixOnDisk, pd.DataFrame]:
    """The matrix of raw counts and the table of its genes. The check of values comes with their reading."""
    raw = "raw" in file and cells.counts != "X"
    if cells.counts == "raw" and not raw:
        raise DataError(f"{where}: has no `raw`; set cells.counts to X if X holds counts")
    holder = file["raw"] if raw else file
    matrix = holder["X"]
    if not (isinstance(matrix, h5py.Group) and matrix.attrs.get("encoding-type") == "csr_matrix"):
        raise DataError(f"{where}: {'raw.' * raw}X is no CSR matrix, so its rows cannot be read one by one")
    return MatrixOnDisk(matrix), _read(holder["var"])


def _genes(table: pd.DataFrame, cells: H5adCells | MinifiedCells, name: str) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Table of the genes that are kept, and their columns (None for all)."""
    ids = table.index.astype(str) if check_gene_id(str(table.index[0]), cells.organism) is None else None
    if ids is None and "feature_id" in table:
        ids = pd.Index(table["feature_id"].astype(str))
    first = str(table.index[0] if ids is None else ids[0])
    problem = check_gene_id(first, cells.organism)
    if ids is None or problem is not None:
        raise DataError(f"{name}: var: {problem}; the file's genes must be named by Ensembl ids of {cells.organism}")
    ids = pd.Index([gene.partition(".")[0] for gene in ids], name="feature_id")
    names = table["feature_name"].astype(str).to_numpy(dtype=object) if "feature_name" in table else ids.to_numpy()
    var = pd.DataFrame({"feature_name": names}, index=ids)
    if cells.genes is None:
        return var, None
    wanted = {gene.partition(".")[0] for gene in cells.genes}
    missing = sorted(wanted - set(ids))
    if missing:
        raise ConfigError(f"{name}: cells.genes: {missing[0]!r} is not in the file ({len(missing)} of {len(wanted)})")
    columns = np.flatnonzero(ids.isin(wanted))
    return var.iloc[columns], columns


def _named_genes(table: pd.DataFrame, cells: MinifiedCells, name: str, symbols: Mapping[str, str]) -> pd.DataFrame:
    """The model's genes with the file's own symbols, else with those of the table of symbols, else without.

    Raises
    ------
    DataError
        If a table of symbols names none of the genes.
    """
    if not len(table):
        return pd.DataFrame(index=pd.Index([], name="feature_id", dtype=object))
    var, _ = _genes(table, cells, name)
    if "feature_name" in table:
        return var
    if symbols and not var.index.isin(symbols).any():
        raise DataError(f"{name}: cells.symbols: names none of the file's genes, such as {var.index[0]!r}")
    return var.assign(feature_name=[symbols.get(gene, gene) for gene in var.index]) if symbols else var[[]]


def _blocks(matrix: MatrixOnDisk, rows: np.ndarray, columns: np.ndarray | None) -> Iterator[sparse.csr_matrix]:
    for start in range(0, len(rows), ROWS):
        block = read_rows(matrix, rows[start : start + ROWS])
        block.eliminate_zeros()
        block.sort_indices()
        yield block if columns is None else sparse.csr_matrix(block[:, columns])


def _count(matrix: MatrixOnDisk, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """`nnz` and `raw_sum` of every cell, by blocks of rows."""
    n, found = matrix.shape[0], {}
    stored, total = np.zeros(n, dtype=np.int64), np.zeros(n)
    for start in range(0, n, ROWS):
        rows = np.arange(start, min(start + ROWS, n))
        block = read_rows(matrix, rows)
        block.eliminate_zeros()
        stored[rows] = np.diff(block.indptr)
        total[rows] = np.asarray(block.sum(axis=1), dtype=np.float64).ravel()
    found = {"nnz": stored, "raw_sum": total}
    return {key: found[key] for key in columns}


# --- latents ------------------------------------------------------------------------------------------------------


def _latents(file: h5py.File, key: str, rows: np.ndarray, where: str) -> np.ndarray:
    """Some rows of an array of `obsm` (n_rows, n_latent), float32, read slab by slab."""
    if key not in file.get("obsm", {}):
        raise DataError(f"{where}: obsm has no {key!r}; {suggest(key, file.get('obsm', {}))}")
    array = file["obsm"][key]
    found = np.empty((len(rows), array.shape[1]), dtype=np.float32)
    for start in range(0, array.shape[0], SLAB):
        low, high = np.searchsorted(rows, (start, start + SLAB))
        if high > low:
            found[low:high] = array[start : start + SLAB][rows[low:high] - start]
    return found
