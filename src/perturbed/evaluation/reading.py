"""Rows of a large h5ad, read from disk in blocks; the whole matrix is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.contracts import check_prepared
from perturbed.errors import DataError

BLOCK = 4096
"""Rows read at a time."""


class CellFile:
    """`prepared.h5ad` with its annotations in memory and its matrix on disk.

    Parameters
    ----------
    path
        The file; `X` is CSR or dense.

    Raises
    ------
    DataError
        If the file is missing, truncated, no h5ad, or no prepared file.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py

        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file; make it with `perturbed prepare`, or correct the path")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: not a readable h5ad ({reason}); delete it and rerun") from None
        try:
            self.obs, self.var = self._annotations()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CellFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _annotations(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        import anndata

        missing = [key for key in ("X", "obs", "var", "uns") if key not in self._file]
        if missing:
            raise DataError(f"{self.path}: {missing[0]} is missing; make the file with `perturbed prepare`")
        read = {key: anndata.io.read_elem(self._file[key]) for key in ("obs", "var", "uns")}
        frame = anndata.AnnData(obs=read["obs"], var=read["var"], uns=read["uns"])
        check_prepared(frame, self.path)
        encoding = self._file["X"].attrs.get("encoding-type", "array")
        if encoding not in ("csr_matrix", "array"):
            raise DataError(f"{self.path}: X is stored as {encoding}, not csr_matrix; make it with `perturbed prepare`")
        return frame.obs, frame.var

    def blocks(self, wanted: np.ndarray, columns: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Any]]:
        """The wanted rows in blocks: their positions in the file, ascending, and their CSR float32 matrix.

        Parameters
        ----------
        wanted
            Row positions in any order.
        columns
            Column positions to take, in this order; None takes all.
        """
        wanted = np.sort(wanted)
        every = columns is None or (len(columns) == len(self.var) and (columns == np.arange(len(columns))).all())
        for start in range(0, len(self.obs), BLOCK):
            low, high = np.searchsorted(wanted, [start, start + BLOCK])
            rows = wanted[low:high]
            if len(rows):
                first, last = int(rows[0]), int(rows[-1]) + 1
                block = self._rows(first, last)
                block = block if len(rows) == last - first else block[rows - first]
                yield rows, block if every else block[:, np.asarray(columns)]

    def _rows(self, first: int, last: int) -> sparse.csr_matrix:
        group = self._file["X"]
        if not hasattr(group, "keys"):
            return sparse.csr_matrix(group[first:last].astype(np.float32))
        bounds = group["indptr"][first : last + 1]
        taken = slice(int(bounds[0]), int(bounds[-1]))
        data, indices = group["data"][taken], group["indices"][taken]
        shape = (last - first, len(self.var))
        return sparse.csr_matrix((data.astype(np.float32, copy=False), indices, bounds - bounds[0]), shape=shape)

    def take(self, wanted: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        """The wanted rows as one CSR matrix, in the order asked for."""
        parts = [block for _, block in self.blocks(wanted, columns)]
        stacked = sparse.csr_matrix(sparse.vstack(parts))
        return stacked[np.argsort(np.argsort(wanted, kind="stable"), kind="stable")]
