"""Matrices that stay on disk: rows by position, sums and products by blocks, and a training order that reads blocks.

What is read is AnnData's own on-disk CSR format, with h5py, one block of neighbouring cells at a time. A matrix that
fits the memory budget is never handled here, so that nothing changes for it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from perturbed.data.matrices import row_blocks
from perturbed.errors import ConfigError, DataError

MEMORY_VARIABLE = "PERTURBED_MEMORY_GB"
"""Environment variable that sets the memory budget in GB (10⁹ bytes)."""
MEMORY_SHARE = 0.5
"""Share of the memory available that the cells may take where nothing else is said."""
BYTES_PER_VALUE = 8
"""A stored value in memory: float32 and a 32-bit index."""
BLOCK_CELLS = 32
"""Neighbouring cells that a streamed training order reads together."""
WINDOW_CELLS = 32_768
"""Cells of a streamed training order that are in memory, and shuffled, at a time."""
_READ_VALUES = 4_000_000
"""Values read from disk in one go."""
_GAP_VALUES = 20_000
"""Unwanted values between two wanted rows that are read along, since a second read costs more."""


# --- how much fits ------------------------------------------------------------------------------------------------


def memory_budget(gigabytes: float | None = None) -> int:
    """Bytes that cells may take in memory.

    Parameters
    ----------
    gigabytes
        The budget in GB; where not given `PERTURBED_MEMORY_GB`, and without that half of the memory available.

    Raises
    ------
    ConfigError
        If the variable holds no positive number.
    """
    text = os.environ.get(MEMORY_VARIABLE, "")
    if gigabytes is None and text:
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
    if gigabytes is None:
        return int(MEMORY_SHARE * available_memory())
    if not gigabytes > 0:
        raise ConfigError(f"{MEMORY_VARIABLE} or --memory-gb: {text or gigabytes} is no positive number of GB; mend it")
    return int(gigabytes * 1e9)


def available_memory(root: str | Path = "/") -> int:
    """Bytes that a process may still take: of the machine, of the control group (batch job, container) it is in, or of
    its Slurm job, whose memory a cluster may watch without control groups.

    Parameters
    ----------
    root
        Where `proc` and `sys` lie.
    """
    root = Path(root)
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found += _group_limits(root / "sys/fs/cgroup", controllers, path.strip("/"))
    except OSError:  # no Linux
        pass
    asked = os.environ.get("SLURM_MEM_PER_NODE", "")
    if asked.isdigit() and int(asked) > 0:  # 0 is all of the node
        found.append(int(asked) * 2**20)
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_limits(base: Path, controllers: str, path: str) -> list[int]:
    """Limits of a control group and those above it, less what processes hold already (files in cache do not count)."""
    if controllers == "":  # version 2
        names = ("memory.max", "memory.current", "inactive_file")
    elif "memory" in controllers.split(","):
        base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    else:
        return []
    folder, left = base / path, []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(base):
            break
        try:
            limit = (group / names[0]).read_text().strip()
            if limit.isdigit():
                held = int((group / names[1]).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left.append(max(0, int(limit) - held + int(stat.get(names[2], 0))))
        except OSError:
            continue
    return left


def row_lengths(matrix: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """Stored values of each row of a CSR matrix on disk, or of some rows (n_rows,)."""
    lengths = np.diff(matrix.group["indptr"][:])
    return np.asarray(lengths if rows is None else lengths[rows])


def take_rows(matrix: Any, rows: np.ndarray) -> Any:
    """Some rows, ascending, of a matrix in memory or on disk, where they stay."""
    return matrix.with_rows(rows) if isinstance(matrix, StreamedMatrix) else matrix[rows]


def takes_all(columns: np.ndarray, n_columns: int) -> bool:
    """Whether these are all columns in their order, so that taking them changes nothing."""
    return len(columns) == n_columns and bool((columns == np.arange(n_columns)).all())


# --- a matrix on disk ---------------------------------------------------------------------------------------------


class StreamedMatrix:
    """Some rows and columns of a CSR matrix on disk, in the few operations that methods need of a matrix.

    `matrix[rows]` is a CSR matrix in memory, in the order asked for. Rows that are pinned or loaded come from memory,
    others from disk; the values are the same.

    Parameters
    ----------
    source
        Anything with the `group` of an on-disk CSR matrix (`perturbed.data.ondisk.MatrixOnDisk`, anndata's backed one).
    rows
        Positions in the file, ascending; all where not given.
    columns
        Positions of columns in the order wanted; all where not given.

    Raises
    ------
    DataError
        If the matrix is not CSR.
    """

    def __init__(self, source: Any, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> None:
        if getattr(source, "format", "csr") != "csr":
            path = source.group.file.filename
            raise DataError(f"{path}: {source.group.name} is not CSR; make the file with `perturbed prepare`")
        self.source, self.group = source, source.group
        n_rows, n_columns = source.shape
        self.rows = np.arange(n_rows) if rows is None else np.asarray(rows)
        self.columns = None if columns is None or takes_all(columns, n_columns) else columns
        self._start = self.group["indptr"][:]
        stored = self._start[self.rows + 1] - self._start[self.rows]
        self.indptr = np.concatenate([[0], np.cumsum(stored)])
        """Where each row would begin with all columns, for `perturbed.data.matrices.row_blocks`."""
        self._cache = np.full(len(self.rows), -1, dtype=np.int64)
        self._pinned: sparse.csr_matrix | None = None
        self._window: sparse.csr_matrix | None = None
        self._pinned_rows = self._window_rows = np.zeros(0, dtype=np.int64)

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), self.source.shape[1] if self.columns is None else len(self.columns)

    @property
    def nnz(self) -> int:
        """Stored values of the rows, over all columns of the file."""
        return int(self.indptr[-1])

    def with_columns(self, columns: np.ndarray) -> StreamedMatrix:
        """The same rows with some columns, given by position among all columns of the file."""
        return StreamedMatrix(self.source, self.rows, columns)

    def with_rows(self, rows: np.ndarray) -> StreamedMatrix:
        """Some of the rows, ascending; nothing is read."""
        return StreamedMatrix(self.source, self.rows[rows], self.columns)

    # --- rows -------------------------------------------------------------------------------------------------------

    def __getitem__(self, rows: np.ndarray | slice) -> sparse.csr_matrix:
        rows = np.arange(self.shape[0])[rows]  # slices and masks, too
        place = self._cache[rows]
        absent = place < 0
        distinct, back = np.unique(rows[absent], return_inverse=True)
        parts = [self._read(distinct)]
        offset, where = len(distinct), np.empty(len(rows), dtype=np.int64)
        where[absent] = back
        n_pinned = len(self._pinned_rows)
        for matrix, chosen, first in (
            (self._pinned, (place >= 0) & (place < n_pinned), 0),
            (self._window, place >= n_pinned, n_pinned),
        ):
            if matrix is not None and chosen.any():
                where[chosen] = offset + np.arange(int(chosen.sum()))
                parts.append(matrix[place[chosen] - first])
                offset += int(chosen.sum())
        stacked = parts[0] if len(parts) == 1 else sparse.vstack([p for p in parts if p.shape[0]], format="csr")
        return sparse.csr_matrix(stacked if (where == np.arange(len(where))).all() else stacked[where])

    def pin(self, rows: np.ndarray) -> None:
        """Keep some rows in memory for good, such as the control cells that every batch draws from."""
        self.release()
        self._cache[self._pinned_rows] = -1
        self._pinned, self._pinned_rows = self._load(rows)
        self._cache[self._pinned_rows] = np.arange(len(self._pinned_rows))

    def load(self, rows: np.ndarray) -> None:
        """Keep some rows in memory until others are loaded; pinned ones are not read twice."""
        self.release()
        self._window, self._window_rows = self._load(np.asarray(rows)[self._cache[rows] < 0])
        self._cache[self._window_rows] = len(self._pinned_rows) + np.arange(len(self._window_rows))

    def release(self) -> None:
        """Forget the rows that were loaded."""
        self._cache[self._window_rows] = -1
        self._window, self._window_rows = None, np.zeros(0, dtype=np.int64)

    def _load(self, rows: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        ordered = np.unique(rows)
        return self._read(ordered), ordered

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Rows in ascending order from disk, without the detour over what is cached."""
        spans = list(self._spans(rows))
        if not spans:
            return sparse.csr_matrix(np.zeros((0, self.shape[1]), dtype=np.float32))
        parts = [self._read_span(rows[span]) for span in spans]
        return parts[0] if len(parts) == 1 else sparse.csr_matrix(sparse.vstack(parts, format="csr"))

    def _spans(self, rows: np.ndarray) -> Iterator[slice]:
        """Runs of rows that are read in one go: nearly neighbours, and not too many."""
        at = self.rows[rows]
        if not len(at):
            return
        begin, end = self._start[at], self._start[at + 1]
        far = np.flatnonzero(begin[1:] - end[:-1] > _GAP_VALUES) + 1
        for first, last in zip([0, *far], [*far, len(at)]):
            start = int(first)
            while start < last:
                stop = start + int(np.searchsorted(end[start:last], begin[start] + _READ_VALUES, side="right"))
                stop = max(stop, start + 1)
                yield slice(start, stop)
                start = stop

    def _read_span(self, rows: np.ndarray) -> sparse.csr_matrix:
        at = self.rows[rows]
        first, last = int(at[0]), int(at[-1]) + 1
        bounds = self._start[first : last + 1]
        taken = slice(int(bounds[0]), int(bounds[-1]))
        data = self.group["data"][taken].astype(np.float32, copy=False)
        indices = self.group["indices"][taken].astype(np.int32, copy=False)
        local = (bounds - bounds[0]).astype(np.int32)
        block = sparse.csr_matrix((data, indices, local), shape=(last - first, self.source.shape[1]))
        if len(at) < last - first:
            block = block[at - first]
        return block if self.columns is None else block[:, self.columns]

    # --- the whole --------------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """All rows in order, in blocks of about four million values."""
        for rows in row_blocks(self):  # type: ignore[arg-type]
            yield rows, self._read(np.arange(rows.start, rows.stop))

    def sum(self, axis: int) -> np.ndarray:
        """Sum over rows (axis 0, (1, n_columns)) or columns (axis 1, (n_rows, 1)), float64."""
        if axis == 1:
            return self @ np.ones((self.shape[1], 1))
        return np.asarray(np.ones((1, self.shape[0])) @ self)

    def mean(self, axis: int) -> np.ndarray:
        """Mean over rows or columns, shaped as `sum`."""
        return self.sum(axis) / self.shape[axis]

    def __matmul__(self, other: np.ndarray) -> np.ndarray:
        found = np.empty((self.shape[0], *np.shape(other)[1:]))
        for rows, block in self.blocks():
            found[rows] = block.astype(np.float64) @ other
        return found

    __array_ufunc__ = None  # so that `array @ matrix` comes here

    def __rmatmul__(self, other: Any) -> Any:
        """Product with a few rows of weights on the left: dense in, dense out; sparse in, sparse out."""
        columns = sparse.csc_matrix(other, dtype=np.float64)
        total = np.zeros((columns.shape[0], self.shape[1]))
        for rows, block in self.blocks():
            total += (columns[:, rows] @ block.astype(np.float64)).toarray()
        return sparse.csr_matrix(total) if sparse.issparse(other) else total

    def checksum(self) -> int:
        """Checksum of all values and of which they are; reads the matrix once."""
        found = zlib.crc32(np.ascontiguousarray(self.indptr).data)
        for _, block in self.blocks():
            for array in (block.data, block.indices):
                found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return found


# --- the order of training ----------------------------------------------------------------------------------------


def batch_by_windows(
    matrices: tuple[StreamedMatrix, ...], rows: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of one epoch of cells on disk; bind the first argument to get a `perturbed.training.Batches`.

    The training rows are cut into blocks of `BLOCK_CELLS` neighbours; the blocks come in random order, `WINDOW_CELLS`
    cells of them are read at a time, and batches are drawn from these without regard to their block. Every cell comes
    once an epoch, from another window and in other company each time. All draws are made before the first cell is
    read, so the order depends on the generator alone, never on what happens to be in memory.

    Parameters
    ----------
    matrices
        What the rows are loaded into.
    rows, batch_size, rng
        As the training loop hands them over; the rows ascending.
    """
    order, ends = draw_windows(rows, batch_size, rng)
    start = 0
    for end in ends:
        window = order[start:end]
        for matrix in matrices:
            matrix.load(window)
        for first in range(0, len(window), batch_size):
            yield window[first : first + batch_size]
        start = end
    for matrix in matrices:
        matrix.release()


def draw_windows(rows: np.ndarray, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """The order of the rows of one epoch, and where each window of it ends; windows hold whole batches but the last."""
    blocks = np.split(rows, range(BLOCK_CELLS, len(rows), BLOCK_CELLS))
    order = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))]) if len(rows) else rows
    size = max(1, WINDOW_CELLS // batch_size) * batch_size
    ends = [*range(size, len(order), size), len(order)] if len(order) else []
    start = 0
    for end in ends:
        order[start:end] = rng.permutation(order[start:end])
        start = end
    return order, ends
