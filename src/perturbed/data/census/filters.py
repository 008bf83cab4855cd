"""Conditions on `obs`: as text in the filter language of SOMA, and as masks of a table."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from perturbed.data.census.spec import Clause
from perturbed.errors import ConfigError, DataError, suggest

SEVERAL = " || "
"""Parts the values of a cell that has several, as releases since 2025-11-08 do for `disease`."""


def values_of(text: str) -> list[str]:
    """The values of a cell: itself, and each of several."""
    return [text, *text.split(SEVERAL)] if SEVERAL in text else [text]


def widen(clause: Clause, known: Callable[[str], set[str] | None]) -> Clause:
    """A clause whose `values` name every joined value that holds one of them, too.

    Parameters
    ----------
    known
        Gives the values of a column of text; None for other columns.
    """
    if clause.values is None:
        return clause
    wanted, found = set(clause.values), known(clause.column) or set()
    joined = sorted(value for value in found - wanted if wanted & set(values_of(value)))
    return clause.model_copy(update={"values": (*clause.values, *joined)}) if joined else clause


def as_text(clause: Clause | str) -> str:
    """A clause in the filter language of SOMA."""
    if isinstance(clause, str):
        return clause.strip()
    if clause.values is not None:
        if len(clause.values) == 1:
            return f"{clause.column} == {_literal(clause.values[0])}"
        if all(isinstance(value, bool) for value in clause.values):  # the language has no list of truth values
            return " or ".join(f"{clause.column} == {value}" for value in clause.values)
        return f"{clause.column} in [{', '.join(map(_literal, clause.values))}]"
    bounds = [(">=", clause.at_least), ("<=", clause.at_most)]
    return " and ".join(f"{clause.column} {sign} {_number(value)}" for sign, value in bounds if value is not None)


def join(clauses: Sequence[Clause | str]) -> str | None:
    """All clauses as one filter; None where there is no clause."""
    return " and ".join(f"({as_text(clause)})" for clause in clauses) or None


def columns_of(clause: Clause | str) -> list[str]:
    """Columns that a clause names.

    Raises
    ------
    ConfigError
        If a text is not in the filter language of SOMA.
    """
    if isinstance(clause, Clause):
        return [clause.column]
    try:
        tree = ast.parse(clause.strip(), mode="eval")
    except SyntaxError as error:
        raise ConfigError(
            f"cells.obs_filter: {clause!r} cannot be read ({error.msg}); write such as tissue_general == 'pancreas'"
        ) from None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {call.func for call in calls}
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in called]
    attributes = [call.args[0] for call in calls if getattr(call.func, "id", "") == "attr" and call.args]
    names += [str(node.value) for node in attributes if isinstance(node, ast.Constant)]
    if not names:
        raise ConfigError(f"cells.obs_filter: {clause!r} names no column; write such as tissue_general == 'pancreas'")
    return list(dict.fromkeys(names))


def match(clause: Clause, column: pd.Series) -> np.ndarray:
    """Rows of a column that a clause keeps, as booleans (n_rows,)."""
    if clause.values is not None:
        values = set(map(str, clause.values)) if _is_text(column) else set(clause.values)
        return np.asarray((column.astype(str) if _is_text(column) else column).isin(values), dtype=bool)
    if _is_text(column):
        raise DataError(f"cells.obs_filter: {clause.column} holds text, so `at_least` and `at_most` mean nothing")
    numbers = pd.to_numeric(column).to_numpy()
    low = -np.inf if clause.at_least is None else clause.at_least
    high = np.inf if clause.at_most is None else clause.at_most
    return np.asarray((numbers >= low) & (numbers <= high), dtype=bool)


def select(obs: pd.DataFrame, clauses: Sequence[Clause], where: str) -> np.ndarray:
    """Rows of a table that all clauses keep (n_kept,), ascending.

    Raises
    ------
    DataError
        If no row is left; the message says how many each clause leaves.
    """
    kept = np.ones(len(obs), dtype=bool)
    left = []
    for clause in clauses:
        kept &= match(clause, obs[clause.column])
        left.append((as_text(clause), int(kept.sum())))
    if not kept.any():
        raise DataError(describe_empty(where, len(obs), left))
    return np.flatnonzero(kept)


def describe_empty(where: str, total: int, left: Sequence[tuple[str, int]]) -> str:
    """The line for a filter that matches nothing, from the number of cells that each further clause leaves."""
    steps = ", ".join(f"{text} leaves {count:,}" for text, count in left)
    return f"{where}: no cell matches: of {total:,} cells, {steps or 'none'}; correct cells.obs_filter"


def check_columns(where: str, wanted: Sequence[str], clauses: Sequence[Clause | str], valid: Sequence[str]) -> None:
    """Refuse columns that `obs` does not have.

    Raises
    ------
    ConfigError
        One line that names the column and the nearest valid one.
    """
    named = [("cells.columns", name) for name in wanted]
    named += [("cells.obs_filter", name) for clause in clauses for name in columns_of(clause)]
    for key, name in named:
        if name not in valid:
            raise ConfigError(f"{where}: {key}: obs has no column {name!r}; {suggest(name, valid)}")


def check_values(where: str, clauses: Sequence[Clause | str], known: Callable[[str], set[str] | None]) -> None:
    """Refuse values that no cell has, since a misspelt one among others would go unnoticed.

    Raises
    ------
    ConfigError
        One line that names the value and the nearest one.
    """
    for clause in clauses:
        if isinstance(clause, str) or clause.values is None:
            continue
        found = known(clause.column)
        if found is not None:
            found = {value for joined in found for value in values_of(joined)}
        for value in clause.values:
            if found is not None and isinstance(value, str) and value not in found:
                raise ConfigError(
                    f"{where}: cells.obs_filter: no cell has {clause.column} {value!r}; {suggest(value, found)[:600]}"
                )


def _literal(value: str | bool | int | float) -> str:
    return repr(value)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def _is_text(column: pd.Series) -> bool:
    return (
        isinstance(column.dtype, pd.CategoricalDtype)
        or pd.api.types.is_object_dtype(column.dtype)
        or (pd.api.types.is_string_dtype(column.dtype))
    )
