"""Sparse matrices in bounded memory: conversion, sums and checks by blocks of rows, and rows of a file on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse

from perturbed.errors import DataError

_BLOCK = 4_000_000
"""Stored values handled at once; bounds every temporary array to a few times 32 MB."""
_GAP = 16_384
"""Values on disk that are sooner read and dropped than skipped: chunks are unpacked whole, and each request costs."""


def row_blocks(matrix: sparse.csr_matrix, *, dense: bool = False) -> Iterator[slice]:
    """Slices of consecutive rows (at least one) that hold about four million values each.

    Counts stored values, or all of them where the caller makes the rows `dense`.
    """
    start, n_rows = 0, matrix.shape[0]
    while start < n_rows:
        if dense:
            stop = start + max(1, _BLOCK // max(1, matrix.shape[1]))
        else:
            stop = int(np.searchsorted(matrix.indptr, int(matrix.indptr[start]) + _BLOCK, side="right")) - 1
        stop = min(max(stop, start + 1), n_rows)
        yield slice(start, stop)
        start = stop


def to_csr(matrix: Any) -> sparse.csr_matrix:
    """Canonical CSR float32 with 32-bit indices where they suffice; dense input is converted by blocks of rows.

    Explicit zeros are dropped, so that stored values are detected genes. NaN stay stored. The input may be changed.
    """
    if sparse.issparse(matrix):
        whole: Any = matrix
        found = sparse.csr_matrix(whole)  # no copy where it is one already
        data = found.data.astype(np.float32, copy=False)
        found = sparse.csr_matrix((data, *_narrow(found)), shape=found.shape)
        found.sum_duplicates()
        if (found.data == 0).any():
            found.eliminate_zeros()
        return found
    return _dense_to_csr(np.asarray(matrix))


def _narrow(matrix: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Indices and indptr, as int32 where the number of stored values allows."""
    limit = np.iinfo(np.int32).max
    small = matrix.nnz <= limit and max(matrix.shape) <= limit
    kind = np.int32 if small else np.int64
    return matrix.indices.astype(kind, copy=False), matrix.indptr.astype(kind, copy=False)


def _dense_to_csr(matrix: np.ndarray) -> sparse.csr_matrix:
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    spans = [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
    per_row = [np.count_nonzero(matrix[span], axis=1) for span in spans]
    total = np.concatenate([[0], np.cumsum(np.concatenate(per_row) if per_row else [])]).astype(np.int64)
    kind = np.int32 if total[-1] <= np.iinfo(np.int32).max else np.int64
    data, indices = np.empty(total[-1], dtype=np.float32), np.empty(total[-1], dtype=kind)
    for span in spans:
        block = sparse.csr_matrix(matrix[span])
        place = slice(int(total[span.start]), int(total[span.start]) + block.nnz)
        data[place], indices[place] = block.data, block.indices
    return sparse.csr_matrix((data, indices, total.astype(kind)), shape=matrix.shape)


def row_sums(matrix: sparse.csr_matrix, columns: np.ndarray | None = None) -> np.ndarray:
    """Sum of each row in float64 (n_rows,), over all columns or over those where `columns` is True."""
    weights = np.ones(matrix.shape[1]) if columns is None else columns.astype(np.float64)
    sums = np.zeros(matrix.shape[0])
    for rows in row_blocks(matrix):
        sums[rows] = _block(matrix, rows) @ weights
    return sums


def column_counts(matrix: Any) -> np.ndarray:
    """Stored values of each column (n_columns,); of a matrix on disk, too."""
    counts = np.zeros(matrix.shape[1], dtype=np.int64)
    for _, indices in _stored_values(matrix):
        counts += np.bincount(indices, minlength=matrix.shape[1])
    return counts


def column_moments(matrix: Any, *, expm1: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance of each column in float64, of `exp(x) - 1` where `expm1`; of a matrix on disk, too.

    The variance is summed from squared differences to the mean, in a second pass, so that it does not cancel.
    """
    n_rows, n_columns = matrix.shape
    total, stored = np.zeros(n_columns), np.zeros(n_columns)
    for values, indices in _column_values(matrix, expm1):
        total += np.bincount(indices, weights=values, minlength=n_columns)
        stored += np.bincount(indices, minlength=n_columns)
    mean = total / n_rows
    squares = (n_rows - stored) * mean**2
    for values, indices in _column_values(matrix, expm1):
        squares += np.bincount(indices, weights=(values - mean[indices]) ** 2, minlength=n_columns)
    return mean, squares / n_rows


def _column_values(matrix: Any, expm1: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for data, indices in _stored_values(matrix):
        values = data.astype(np.float64)
        yield (np.expm1(values) if expm1 else values), indices


def _stored_values(matrix: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values and columns by blocks of rows, from memory or from disk (`perturbed.data.streaming.StreamedMatrix`)."""
    if hasattr(matrix, "blocks"):
        for _, block in matrix.blocks():
            yield block.data, block.indices
        return
    for rows in row_blocks(matrix):
        span = _span(matrix, rows)
        yield matrix.data[span], matrix.indices[span]


def normalise_log1p(counts: sparse.csr_matrix, totals: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    r"""Log-normalised expression, :math:`\log(1 + c_{ij} \cdot \mathrm{target} / \sum_j c_{ij})`.

    Shares the index arrays of `counts`; only the values are new. Computed in float64, stored in float32.

    Parameters
    ----------
    counts
        Counts (n_cells, n_genes).
    totals
        Depth of each cell (n_cells,), larger than 0.
    target_sum
        Depth after normalisation.
    """
    data = np.empty_like(counts.data)
    scale = target_sum / totals
    for rows in row_blocks(counts):
        span = _span(counts, rows)
        factor = np.repeat(scale[rows], np.diff(counts.indptr[rows.start : rows.stop + 1]))
        data[span] = np.log1p(counts.data[span] * factor)
    log = sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False)
    log.has_canonical_format = True
    return log


def find_values(matrix: sparse.csr_matrix, kind: str) -> tuple[int, tuple[int, int] | None]:
    """How many stored values are `nan`, `inf`, `negative` or `fraction`, and the row and column of the first."""
    tests: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "nan": np.isnan,
        "inf": np.isinf,
        "negative": lambda values: values < 0,
        "fraction": lambda values: values != np.rint(values),
    }
    count, first = 0, None
    for rows in row_blocks(matrix):
        span = _span(matrix, rows)
        bad = tests[kind](matrix.data[span])
        n_bad = int(np.count_nonzero(bad))
        if n_bad and first is None:
            place = span.start + int(np.argmax(bad))
            first = int(np.searchsorted(matrix.indptr, place, side="right")) - 1, int(matrix.indices[place])
        count += n_bad
    return count, first


def read_rows(matrix: Any, rows: np.ndarray) -> sparse.csr_matrix:
    """Some rows of a CSR matrix in memory or on disk; on disk, little but these rows is read.

    Parameters
    ----------
    matrix
        A sparse or dense matrix, or anndata's backed CSR dataset.
    rows
        Positions, ascending.
    """
    group = getattr(matrix, "group", None)
    if group is None:
        return sparse.csr_matrix(matrix[rows])
    if getattr(matrix, "format", "csr") != "csr":
        raise DataError(f"{group.file.filename}: {group.name} is not CSR; make the file with `perturbed prepare`")
    indptr = group["indptr"][:]
    lengths = indptr[rows + 1] - indptr[rows]
    target = np.concatenate([[0], np.cumsum(lengths)])
    data = np.empty(target[-1], dtype=group["data"].dtype)
    indices = np.empty(target[-1], dtype=group["indices"].dtype)
    for span in _neighbours(indptr[rows], indptr[rows + 1]):
        place = slice(int(target[span.start]), int(target[span.stop]))
        start, stop = int(indptr[rows[span.start]]), int(indptr[rows[span.stop - 1] + 1])
        # Where each value lies in what is read at once.
        shift = indptr[rows[span]] - start - (target[:-1][span] - place.start)
        within = np.arange(place.stop - place.start) + np.repeat(shift, lengths[span])
        for name, values in (("data", data), ("indices", indices)):
            if stop - start == len(within) > 0:
                group[name].read_direct(values, slice(start, stop), place)
            elif len(within):
                values[place] = group[name][start:stop][within]
    kind = indices.dtype if target[-1] <= np.iinfo(np.int32).max else np.int64
    return sparse.csr_matrix((data, indices, target.astype(kind)), shape=(len(rows), matrix.shape[1]))


def _neighbours(starts: np.ndarray, stops: np.ndarray) -> list[slice]:
    """Rows that are read at once: few values lie between them, and together they are about a block at most."""
    if not len(starts):
        return []
    far = starts[1:] - stops[:-1] > _GAP
    breaks = np.flatnonzero(far | np.diff(starts // _BLOCK).astype(bool)) + 1
    return [slice(int(first), int(last)) for first, last in zip([0, *breaks], [*breaks, len(starts)])]


def _span(matrix: sparse.csr_matrix, rows: slice) -> slice:
    return slice(int(matrix.indptr[rows.start]), int(matrix.indptr[rows.stop]))


def _block(matrix: sparse.csr_matrix, rows: slice) -> sparse.csr_matrix:
    """Some rows in float64, sharing the index array."""
    span = _span(matrix, rows)
    indptr = matrix.indptr[rows.start : rows.stop + 1] - matrix.indptr[rows.start]
    data = matrix.data[span].astype(np.float64)
    return sparse.csr_matrix((data, matrix.indices[span], indptr), shape=(rows.stop - rows.start, matrix.shape[1]))
