"""What a fit may see: training and validation cells of one split, on the split's genes, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from perturbed.data.contracts import Split, read_features, read_split
from perturbed.data.matrices import read_rows, row_sums
from perturbed.data.ondisk import open_tables
from perturbed.errors import DataError, LeakageError
from perturbed.models.base import TrainingData

_KNOWN = ("perturbation", "n_perturbed", "context")


def load_training_data(
    prepared: str | Path, split: str | Path, features: str | Path, files: Mapping[str, Path] | None = None
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
    X = read_rows(cells_on_disk.X, rows)
    counts = read_rows(cells_on_disk.layers["counts"], rows) if "counts" in cells_on_disk.layers else None
    cells = obs.iloc[rows]
    return TrainingData(
        X=X[:, columns].astype(np.float32, copy=False),
        perturbation=_names(cells["perturbation"]),
        context=_names(cells["context"]),
        is_val=(part.iloc[rows] == "val").to_numpy(),
        genes=tuple(chosen.genes),
        centre=chosen.mean,
        loadings=chosen.loadings,
        counts=None if counts is None else counts[:, columns].astype(np.float32, copy=False),
        library=None if counts is None else row_sums(counts),
        covariates=cells.drop(columns=list(_KNOWN)),
        cells=cells.index.to_numpy(dtype=object),
        files=dict(files or {}),
    )


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
