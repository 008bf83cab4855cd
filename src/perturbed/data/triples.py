"""A Matrix Market file with tables that a card describes one by one, joined by name and never by order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perturbed.data.cards import RemoteFile
from perturbed.errors import DataError, suggest

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

REQUIRED = ("matrix", "genes", "cells")


def read_by_role(paths: Sequence[Path], files: Sequence[RemoteFile], name: str) -> AnnData:
    """Read a matrix (genes × cells), its genes and cells and, where given, an annotation of the cells.

    The annotation is joined by the names of the cells, whatever its order; cells it lacks get missing values.

    Parameters
    ----------
    paths
        The files; `.csv` is separated by commas, other tables by tabs, all may be gzipped.
    files
        Their descriptions in the card, in the same order.
    name
        The data set, for messages.

    Raises
    ------
    DataError
        If a role is missing, lengths differ, names repeat, or the annotation shares no cell with the matrix.
    """
    import anndata
    from scipy import sparse
    from scipy.io import mmread

    found = {file.role: (path, file.key) for path, file in zip(paths, files, strict=True)}
    missing = [role for role in REQUIRED if role not in found]
    if missing or None in found or len(found) != len(files):
        raise DataError(
            f"{name}: source.files: give every file a role of its own; {', '.join(missing) or 'check them'}"
        )
    path = found["matrix"][0]
    try:
        matrix = sparse.csr_matrix(mmread(path).T)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{name}: {path} cannot be read ({' '.join(str(error).split())[:160]}); fetch it anew"
        ) from None
    var, obs = _read_table(*found["genes"], name), _read_table(*found["cells"], name)
    if matrix.shape != (len(obs), len(var)):
        raise DataError(
            f"{name}: {path}: {matrix.shape[1]} genes × {matrix.shape[0]} cells, but {len(var)} genes and {len(obs)} "
            "cells are named; the files do not belong together"
        )
    if "annotation" in found:
        table = _read_table(*found["annotation"], name)
        known = obs.index.isin(table.index)
        if not known.any():
            raise DataError(
                f"{name}: {found['annotation'][0]}: names none of the matrix's cells; they are called like "
                f"{table.index[0]!r} there and {obs.index[0]!r} in the matrix; it belongs to other cells"
            )
        obs = table.reindex(obs.index)
    for table in (var, obs):
        table.columns = [str(column).replace("/", "_") for column in table.columns]  # h5ad takes no slash
    return anndata.AnnData(matrix, obs=obs, var=var)


def _read_table(path: Path, key: str | None, name: str) -> pd.DataFrame:
    import pandas as pd

    separator = "," if ".csv" in path.suffixes else "\t"
    if key is None:
        table = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False)
        table.columns = ["name", "symbol", *(f"column_{i}" for i in range(3, table.shape[1] + 1))][: table.shape[1]]
        key = "name"
    else:
        table = pd.read_csv(path, sep=separator)
    if key not in table:
        raise DataError(f"{name}: {path}: no column {key!r}; {suggest(key, map(str, table.columns))}")
    table = table.set_index(table[key].astype(str)).drop(columns=key).rename_axis(None)
    if not table.index.is_unique:
        raise DataError(
            f"{name}: {path}: {table.index[table.index.duplicated()][0]!r} stands in two rows; one is needed"
        )
    return table
