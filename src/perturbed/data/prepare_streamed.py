"""`prepare` for matrices that outgrow memory: read from disk in blocks of cells, written in blocks of cells.

A cell's row depends on that cell alone, so the content is the same as that of `perturbed.data.prepare.prepare`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.annotation import (
    check_controls,
    check_unique,
    dropped_cells,
    dropped_genes,
    label_cells,
    make_obs,
    name_genes,
)
from perturbed.data.cards import Card
from perturbed.data.contracts import check_prepared, write_h5ad
from perturbed.data.matrices import column_counts, find_values, normalise_log1p, row_blocks, row_sums, to_csr
from perturbed.data.prepare import (
    CellSums,
    check_counts,
    check_depths,
    check_keys,
    check_logged,
    check_raw_shape,
    describe,
    drop_unused_categories,
    find_mito,
    pass_quality,
    prepare,
)
from perturbed.data.raw import check_expectations, check_h5ad
from perturbed.data.streaming import memory_budget
from perturbed.errors import DataError
from perturbed.files import atomic

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

_BYTES_PER_VALUE = 24
"""What a stored value takes at the peak of `prepare`: read, copied where cells are dropped, and log-normalised."""
_CHUNK = 2**14
"""Values of a chunk on disk: about as many as a block of a streamed training order holds, so that little is read in
vain."""
_INT32_MAX = 2**31 - 1
_KINDS = ("nan", "inf", "negative", "fraction")


def prepare_file(
    raw_path: str | Path, card: Card, name: str, out: str | Path, *, memory_gb: float | None = None
) -> bool:
    """Prepare a dataset and write `prepared.h5ad`; return whether it was streamed.

    Parameters
    ----------
    raw_path, card, name
        As for `perturbed.data.prepare.prepare`.
    out
        `prepared.h5ad`.
    memory_gb
        Memory budget in GB, see `perturbed.data.streaming.memory_budget`; what needs more is streamed.

    Raises
    ------
    DataError
        Names the file, what is wrong with it and the mend.
    """
    if Path(raw_path).is_file():
        check_h5ad(raw_path, name)
        if _needed(raw_path, card) > memory_budget(memory_gb):
            return _prepare_or_refuse(raw_path, card, name, out)
    adata = prepare(raw_path, card, name)
    check_prepared(adata, out)
    write_h5ad(out, adata)
    return False


def _prepare_or_refuse(raw_path: str | Path, card: Card, name: str, out: str | Path) -> bool:
    log.info("%s: larger than the memory budget; prepared in blocks of cells", raw_path)
    try:
        with h5py.File(raw_path, "r") as file, atomic(out) as part:
            _Streamed(file, str(raw_path), card, name).write(part)
    except (KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk: the caller names it
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{raw_path}: not a readable h5ad ({reason}); it may be truncated, delete it") from None
    return True


def _needed(raw_path: str | Path, card: Card) -> int:
    """Bytes that `prepare` would take at its peak; 0 for what cannot be streamed."""
    total = 0
    with h5py.File(raw_path, "r") as file:
        for matrix in _matrices(file, card).values():
            if isinstance(matrix, h5py.Dataset):
                total += int(np.prod(matrix.shape)) * matrix.dtype.itemsize * 2
            elif matrix.attrs.get("encoding-type") == "csr_matrix":
                total += matrix["data"].shape[0] * _BYTES_PER_VALUE
            else:  # columns by columns: there are no blocks of cells to read
                return 0
    return total


def _matrices(file: h5py.File, card: Card) -> dict[str, Any]:
    """The matrices that are needed, `counts` and `log`; a layer that is not there is left out."""
    found = {}
    key = card.keys.counts
    if key == "X" or (key is not None and key in file.get("layers", ())):
        found["counts"] = file["X"] if key == "X" else file["layers"][key]
    if card.prepare.normalise == "none":
        found["log"] = file["X"]
    return found


# --- reading ------------------------------------------------------------------------------------------------------


class _Rows:
    """What `row_blocks` asks of a matrix."""

    def __init__(self, matrix: Any) -> None:
        dense = isinstance(matrix, h5py.Dataset)
        rows, columns = matrix.shape if dense else matrix.attrs["shape"]
        self.shape = int(rows), int(columns)
        self.indptr = np.zeros(0, dtype=np.int64) if dense else matrix["indptr"][:].astype(np.int64)


def read_blocks(matrix: Any) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Rows of a CSR or dense matrix in an open file, in canonical blocks of about four million values."""
    like: Any = _Rows(matrix)
    dense = isinstance(matrix, h5py.Dataset)
    for rows in row_blocks(like, dense=dense):
        if dense:
            yield rows, to_csr(matrix[rows])
            continue
        bounds = like.indptr[rows.start : rows.stop + 1]
        span = slice(int(bounds[0]), int(bounds[-1]))
        parts = matrix["data"][span], matrix["indices"][span], bounds - bounds[0]
        yield rows, to_csr(sparse.csr_matrix(parts, shape=(rows.stop - rows.start, like.shape[1])))


class _Found:
    """What the checks ask of all values, gathered over blocks."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, tuple[int, int] | None]] = dict.fromkeys(_KINDS, (0, None))
        self.x_sum = 0.0

    def add(self, rows: slice, block: sparse.csr_matrix) -> None:
        self.x_sum += float(row_sums(block).sum())
        for kind, (count, first) in self.found.items():
            more, place = find_values(block, kind)
            if first is None and place is not None:
                first = place[0] + rows.start, place[1]
            self.found[kind] = count + more, first


# --- preparing ----------------------------------------------------------------------------------------------------


class _Streamed:
    """One file on its way from raw to prepared: a pass that sums, decisions, and a pass that writes."""

    def __init__(self, file: h5py.File, where: str, card: Card, name: str) -> None:
        from anndata.io import read_elem

        self.file, self.where, self.card, self.name = file, where, card, name
        self.obs, raw_var = read_elem(file["obs"]), read_elem(file["var"])
        uns = read_elem(file["uns"]) if "uns" in file else {}
        self.provenance = uns.get("provenance", {})
        check_unique(self.obs.index, "cell", where, "make the names unique in the source")
        self.names = self.obs.index, raw_var.index
        self.features, self.renamed = name_genes(raw_var, card.keys, where)
        self.is_gene = ~dropped_genes(raw_var.index, card.keys)
        self.var = self.features[self.is_gene]
        check_keys(card, file.get("layers", ()), where)
        self.matrices = _matrices(file, card)

    @property
    def main(self) -> Any:
        """The matrix of which quality control speaks: counts where there are any."""
        return self.matrices.get("counts", self.matrices.get("log"))

    def write(self, path: Path) -> None:
        """Write the prepared file; not atomic, the caller sees to that."""
        sums = self._scan()
        kept = ~dropped_cells(self.obs, self.card.keys, self.where)
        if not kept.any():
            raise DataError(f"{self.where}: keys.drop drops every cell; correct it in the card")
        dropped = {"keys.drop": int((~kept).sum()), "keys.drop_genes": int((~self.is_gene).sum())}
        table, rows, reasons = self._choose_cells(sums, kept)
        totals = sums.totals[rows]
        if "log" not in self.matrices:
            check_depths(totals, self.where)
        columns, enough = self._choose_genes(rows)
        dropped |= {**reasons, "min_cells_per_gene": int((~enough).sum())}
        result = self._tables(table, self.var[enough], dropped)
        check_prepared(result, path)
        result.write_h5ad(path, compression="gzip", compression_opts=1)
        with h5py.File(path, "r+") as out:
            self._write_values(out, rows, columns, totals)

    def _scan(self) -> CellSums:
        """Check every value and sum up every cell, over the genes that are kept."""
        n_cells = len(self.obs)
        mito = find_mito(self.var, self.card.prepare, self.where) if "counts" in self.matrices else None
        totals, n_genes = np.zeros(n_cells), np.zeros(n_cells, dtype=np.int64)
        of_mito = None if mito is None else np.zeros(n_cells)
        found = {key: _Found() for key in self.matrices}
        for key, matrix in self.matrices.items():
            for rows, block in read_blocks(matrix):
                found[key].add(rows, block)
                if matrix is self.main:
                    block = block if self.is_gene.all() else block[:, self.is_gene]
                    totals[rows], n_genes[rows] = row_sums(block), np.diff(block.indptr)
                    if of_mito is not None:
                        of_mito[rows] = row_sums(block, mito)
        if "counts" in found:
            check_counts(found["counts"].found.__getitem__, self.names, str(self.card.keys.counts), self.where)
        if "log" in found:
            check_logged(found["log"].found.__getitem__, self.names, self.where)
        self.x_sum = next(iter(found.values())).x_sum
        return CellSums(totals, n_genes, of_mito)

    def _choose_cells(self, sums: CellSums, kept: np.ndarray) -> tuple[pd.DataFrame, np.ndarray, dict[str, Any]]:
        """Table and file positions of the cells that pass, and how many do not."""
        card, where = self.card, self.where
        labels = label_cells(self.obs[kept], card.keys, self.features, where)
        check_raw_shape(_Rows(self.main).shape, lambda: self.x_sum, labels, card, where)
        check_expectations({"n_kept": int(kept.sum()), "n_genes": int(self.is_gene.sum())}, card.expect, where)
        table = make_obs(self.obs[kept], labels, card.keys, where)
        own = CellSums(sums.totals[kept], sums.n_genes[kept], None if sums.mito is None else sums.mito[kept])
        passed, reasons = pass_quality(own, table, card.prepare, where, has_counts="counts" in self.matrices)
        check_controls(table[passed], labels, card.keys, where)
        return table[passed], np.flatnonzero(kept)[passed], reasons

    def _choose_genes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File positions of the genes written, and which of those that are genes are detected in enough cells."""
        least, enough = self.card.prepare.min_cells_per_gene, np.ones(len(self.var), dtype=bool)
        if least:
            counts = np.zeros(len(self.is_gene), dtype=np.int64)
            for span, block in read_blocks(self.main):
                counts += column_counts(_within(block, span, rows))
            enough = counts[self.is_gene] >= least
        return np.flatnonzero(self.is_gene)[enough], enough

    def _tables(self, table: pd.DataFrame, var: pd.DataFrame, dropped: dict[str, Any]) -> AnnData:
        import anndata

        result = anndata.AnnData(obs=drop_unused_categories(table), var=var)
        describe(result, self.card, self.name, self.where, dropped, self.renamed, self.provenance)
        return result

    def _write_values(self, out: h5py.File, rows: np.ndarray, columns: np.ndarray, totals: np.ndarray) -> None:
        if "X" in out:
            del out["X"]
        every = len(columns) == len(self.is_gene)
        writers = {"log": CsrWriter(out.create_group("X"), len(columns))}
        if "counts" in self.matrices:
            writers["counts"] = CsrWriter(out["layers"].create_group("counts"), len(columns))
        for key, matrix in self.matrices.items():
            done = 0
            for span, block in read_blocks(matrix):
                cells = _within(block, span, rows)
                kept = cells if every else cells[:, columns]
                writers[key].append(kept)
                if key == "counts" and "log" not in self.matrices:  # the depth counts all genes, also those not kept
                    depth = totals[done : done + cells.shape[0]]
                    writers["log"].append(normalise_log1p(kept, depth, self.card.prepare.target_sum))
                done += cells.shape[0]
        for writer in writers.values():
            writer.finish()


def _within(block: sparse.csr_matrix, span: slice, rows: np.ndarray) -> sparse.csr_matrix:
    """Those rows of a block that are among `rows` (file positions, ascending)."""
    first, last = np.searchsorted(rows, [span.start, span.stop])
    chosen = rows[first:last] - span.start
    return block if len(chosen) == block.shape[0] else block[chosen]


class CsrWriter:
    """Writes AnnData's on-disk CSR format by blocks of rows.

    Parameters
    ----------
    group
        An empty group.
    n_columns
        Columns of every block.
    """

    def __init__(self, group: h5py.Group, n_columns: int) -> None:
        self.group, self.n_columns = group, n_columns
        self.lengths: list[np.ndarray] = []
        how = {"shape": (0,), "maxshape": (None,), "chunks": (_CHUNK,), "compression": "gzip", "compression_opts": 1}
        self.stored = {
            "data": group.create_dataset("data", dtype=np.float32, **how),
            "indices": group.create_dataset("indices", dtype=np.int32, **how),
        }

    def append(self, block: sparse.csr_matrix) -> None:
        """Append rows."""
        start = self.stored["data"].shape[0]
        for key, values in (("data", block.data), ("indices", block.indices)):
            self.stored[key].resize((start + block.nnz,))
            self.stored[key][start:] = values
        self.lengths.append(np.diff(block.indptr))

    def finish(self) -> None:
        """Write where the rows begin."""
        indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, dtype=np.int64), *self.lengths]))])
        kind = np.int32 if indptr[-1] <= _INT32_MAX else np.int64
        self.group.create_dataset("indptr", data=indptr.astype(kind), compression="gzip", compression_opts=1)
        shape = np.array([len(indptr) - 1, self.n_columns], dtype=np.int64)
        self.group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
