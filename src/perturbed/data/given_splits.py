"""Splits that bring all parts with them: from a column of the cells, or from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbed.config import FromColumn, FromFile
from perturbed.data.contracts import PARTS, read_split
from perturbed.errors import DataError, suggest


def parts_of_column(obs: pd.DataFrame, spec: FromColumn, where: str) -> np.ndarray:
    """Parts from a column of the cells (n_cells,).

    Raises
    ------
    DataError
        If there is no such column, or it holds what is no part.
    """
    if spec.column not in obs:
        raise DataError(
            f"{where}: no obs column {spec.column!r} in the prepared file; name it in the card's keys.keep "
            f"({suggest(spec.column, map(str, obs.columns))})"
        )
    text = obs[spec.column].astype(object).where(obs[spec.column].notna(), "").astype(str)
    part = text.map(lambda value: spec.values.get(value, value))
    unknown = sorted(set(text[~part.isin(PARTS)]))
    if unknown:
        raise DataError(
            f"{where}: column {spec.column!r} holds {unknown[0]!r}, which is not one of {', '.join(PARTS)}; say what "
            "it means in `values`"
        )
    return part.to_numpy(dtype=object)


def parts_of_file(cells: pd.DataFrame, spec: FromFile, fold: int, dataset: str, where: str) -> np.ndarray:
    """Parts by cell name; cells the file does not name are not used (n_cells,).

    Raises
    ------
    DataError
        If the file is no split, or is of other cells.
    """
    path = spec.path.replace("{dataset}", dataset).replace("{fold}", str(fold))
    if spec.folds > 1 and "{fold}" not in spec.path:
        raise DataError(f"{where}: `folds` is {spec.folds} but {{fold}} does not stand in `path`; add it")
    table = _read_foreign(Path(path))
    strangers = table.index.difference(cells.index)
    if len(strangers):
        raise DataError(
            f"{path}: {len(strangers)} cells are not in the prepared data, such as {strangers[0]!r}; use the cell "
            "names of prepared.h5ad, and leave out cells that quality control dropped"
        )
    if "perturbation" in table:
        ours = cells["perturbation"].reindex(table.index)
        differ = table.index[(table["perturbation"] != ours).to_numpy()]
        if len(differ):
            cell = differ[0]
            raise DataError(
                f"{path}: cell {cell!r} is {table.loc[cell, 'perturbation']!r} there but {ours[cell]!r} in the "
                f"prepared data ({len(differ)} such cells); use canonical names, or leave the column out"
            )
    return table["part"].reindex(cells.index).fillna("unused").to_numpy(dtype=object)


def _read_foreign(path: Path) -> pd.DataFrame:
    """A split.csv of ours, or a plain csv with the columns `cell` and `part`."""
    try:
        with open(path, encoding="utf-8") as handle:
            ours = handle.readline().startswith("# ")
        if ours:
            return read_split(path).table
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: cannot be read as a split ({reason}); check `path`") from None
    for column in ("cell", "part"):
        if column not in table:
            raise DataError(f"{path}: column {column!r} is missing; a split needs `cell` and `part`")
    if table["cell"].duplicated().any():
        raise DataError(f"{path}: cell {table['cell'][table['cell'].duplicated()].iloc[0]!r} stands in two rows")
    unknown = sorted(set(table["part"]) - set(PARTS))
    if unknown:
        raise DataError(f"{path}: part {unknown[0]!r} is not one of {', '.join(PARTS)}")
    return table.set_index("cell")
