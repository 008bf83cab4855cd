"""What a fit may see: training and validation cells of one split, on the split's genes, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.data.contracts import Split, read_features, read_split
from perturbed.data.matrices import read_rows, row_sums
from perturbed.data.ondisk import MatrixOnDisk, open_tables
from perturbed.data.streaming import BYTES_PER_VALUE, StreamedMatrix, memory_budget, row_lengths, takes_all
from perturbed.errors import DataError, LeakageError
from perturbed.models.base import TrainingData

log = logging.getLogger(__name__)

_KNOWN = ("perturbation", "n_perturbed", "context")


def load_training_data(
    prepared: str | Path,
    split: str | Path,
    features: str | Path,
    files: Mapping[str, Path] | None = None,
    *,
    streams: bool = False,
    memory_gb: float | None = None,
) -> TrainingData:
    """Read the training and validation cells of a split, on the split's genes.

    Of the matrices on disk only the rows of these cells are read. Cells and genes are found by name; rows are in the
    order of the prepared file, genes in that of the features.

    Parameters
    ----------
    prepared, split, features
        Paths of `prepared.h5ad`, `split.csv` and `features.csv`.
    files
        Side files by role, handed on to the method.
    streams
        Whether the method can read its cells from disk while it trains. Then matrices beyond the memory budget are
        left there (`perturbed.data.streaming.StreamedMatrix`).
    memory_gb
        The memory budget in GB, see `perturbed.data.streaming.memory_budget`.

    Returns
    -------
    TrainingData
        `library` is the sum of counts over all genes of the prepared file.

    Raises
    ------
    DataError
        If cells, labels or genes do not agree by name; names the first.
    LeakageError
        If the features are of another split.
    """
    frozen, chosen = read_split(split), read_features(features)
    if chosen.header.get("split_sha256") != frozen.header["sha256"]:
        raise LeakageError(f"{features}: made from another split than {split}; rerun `perturbed features`")
    cells_on_disk = open_tables(prepared)
    obs, var = cells_on_disk.obs, cells_on_disk.var
    _check_cells(obs, frozen, prepared, split)
    columns = var.index.get_indexer(chosen.genes)
    if (columns < 0).any():
        gene = chosen.genes[columns < 0][0]
        raise DataError(f"{features}: gene {gene!r} is not in {prepared}; rerun `perturbed features` on these data")
    part = frozen.table["part"].reindex(obs.index)
    rows = np.flatnonzero(part.isin(["train", "val"]).to_numpy())
    on_counts = cells_on_disk.layers.get("counts")
    matrices = [cells_on_disk.X] if on_counts is None else [cells_on_disk.X, on_counts]
    stream = streams and _outgrows_memory(matrices, rows, memory_gb, prepared)
    X = _read(cells_on_disk.X, rows, columns, stream)[0]
    counts, library = (None, None) if on_counts is None else _read(on_counts, rows, columns, stream, sums=True)
    cells = obs.iloc[rows]
    return TrainingData(
        X=X,
        perturbation=_names(cells["perturbation"]),
        context=_names(cells["context"]),
        is_val=(part.iloc[rows] == "val").to_numpy(),
        genes=tuple(chosen.genes),
        centre=chosen.mean,
        loadings=chosen.loadings,
        counts=counts,
        library=library,
        covariates=cells.drop(columns=list(_KNOWN)),
        cells=cells.index.to_numpy(dtype=object),
        files=dict(files or {}),
    )


def _outgrows_memory(
    matrices: Sequence[MatrixOnDisk], rows: np.ndarray, memory_gb: float | None, path: str | Path
) -> bool:
    """Whether what would be read takes more than the budget."""
    needed = sum(int(row_lengths(matrix, rows).sum()) for matrix in matrices) * BYTES_PER_VALUE
    budget = memory_budget(memory_gb)
    if needed > budget:
        sizes = f"{needed / 1e9:.3g} GB of training cells, the memory budget is {budget / 1e9:.3g} GB"
        log.info("%s: %s; they are streamed from disk, in an order of training of its own", path, sizes)
    return needed > budget


def _read(
    matrix: MatrixOnDisk, rows: np.ndarray, columns: np.ndarray, stream: bool, *, sums: bool = False
) -> tuple[Any, np.ndarray | None]:
    """Rows and columns of a matrix, and where wanted the sum of each row over all columns of the file."""
    if stream:
        every = StreamedMatrix(matrix, rows)
        return every.with_columns(columns), np.asarray(every.sum(axis=1)).ravel() if sums else None
    found = read_rows(matrix, rows)
    own = found if takes_all(columns, found.shape[1]) else found[:, columns]
    return own.astype(np.float32, copy=False), row_sums(found) if sums else None


def _names(column: pd.Series) -> np.ndarray:
    return column.astype(str).to_numpy(dtype=object)


def _check_cells(obs: pd.DataFrame, split: Split, prepared: str | Path, path: str | Path) -> None:
    """Check that the split's cells exist and are labelled as in the prepared file."""
    strangers = split.table.index.difference(obs.index)
    if len(strangers):
        raise DataError(
            f"{path}: {len(strangers)} cells are not in {prepared}, such as {strangers[0]!r}; rerun `perturbed split`"
        )
    ours = obs["perturbation"].astype(str).reindex(split.table.index)
    differ = split.table.index[(ours != split.table["perturbation"]).to_numpy()]
    if len(differ):
        cell = differ[0]
        raise DataError(
            f"{path}: cell {cell!r} is {split.table.loc[cell, 'perturbation']!r} there but {ours[cell]!r} in "
            f"{prepared} ({len(differ)} such cells); rerun `perturbed split`"
        )
