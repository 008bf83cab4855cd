"""What a source says of its cells and genes, in our names: labels, contexts, gene names, and what a card drops."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from perturbed.data.cards import Keys
from perturbed.data.labels import canonical_labels
from perturbed.errors import DataError, suggest
from perturbed.names import CONTROL, genes_of

log = logging.getLogger(__name__)

_MISSING = ("", "nan")
"""What cards call a missing value; it need not occur."""
RESERVED = ("perturbation", "n_perturbed", "context")


def column_of(table: pd.DataFrame, column: str, key: str, where: str, axis: str = "obs") -> pd.Series:
    """A column that a card names.

    Raises
    ------
    DataError
        If the table has none of this name; suggests the nearest.
    """
    if column not in table:
        raise DataError(f"{where}: {key}: no {axis} column {column!r}; {suggest(column, map(str, table.columns))}")
    return table[column]


def texts(column: pd.Series) -> np.ndarray:
    """Values as text (n_rows,), missing ones as the empty string; converted once for each distinct value."""
    codes, values = pd.factorize(column)
    names = np.array([*map(str, values), ""], dtype=object)
    return names[codes]


def check_unique(names: Iterable[str], what: str, where: str, mend: str) -> None:
    """Check that names do not repeat.

    Raises
    ------
    DataError
        Names the first that do.
    """
    index = pd.Index(names)
    if not index.is_unique:
        repeated = list(dict.fromkeys(index[index.duplicated()].astype(str)))
        shown = ", ".join(map(repr, repeated[:3]))
        raise DataError(f"{where}: {len(repeated)} {what} name(s) repeat, such as {shown}; {mend}")


def name_genes(raw: pd.DataFrame, keys: Keys, where: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Gene table with unique names: the symbol, or `SYMBOL-ID` for genes that share one.

    Returns
    -------
    var : pandas.DataFrame
        Index: gene name; columns `gene_id` and `symbol`.
    renamed : dict
        The names of genes that share a symbol, with that symbol.

    Raises
    ------
    DataError
        If symbols repeat and there are no ids that tell them apart.
    """
    own = raw.index.astype(str).to_numpy(dtype=object)
    symbols = own if keys.symbol is None else texts(column_of(raw, keys.symbol, "keys.symbol", where, "var"))
    ids = own if keys.gene_id is None else texts(column_of(raw, keys.gene_id, "keys.gene_id", where, "var"))
    symbols = np.where(symbols == "", ids, symbols)
    ids = np.where(ids == "", symbols, ids)
    shared = pd.Index(symbols).duplicated(keep=False)
    names = symbols.copy()
    names[shared] = [f"{symbol}-{gene}" for symbol, gene in zip(symbols[shared], ids[shared])]
    if keys.gene_id is None and keys.symbol is None:
        check_unique(symbols, "gene", where, "name a var column of unique ids in keys.gene_id")
    check_unique(names, "gene", where, "the ids of genes that share a symbol repeat too; name unique ids, keys.gene_id")
    var = pd.DataFrame({"gene_id": ids, "symbol": symbols}, index=pd.Index(names, dtype=object))
    return var, dict(zip(names[shared], symbols[shared]))


def dropped_genes(names: pd.Index, keys: Keys) -> np.ndarray:
    """Which features the card drops because they are no genes (n_vars,)."""
    patterns = [re.compile(pattern) for pattern in keys.drop_genes]
    return np.array([any(pattern.fullmatch(name) for pattern in patterns) for name in names.astype(str)], dtype=bool)


def dropped_cells(obs: pd.DataFrame, keys: Keys, where: str) -> np.ndarray:
    """Which cells the card drops (n_obs,); the empty string and `nan` stand for a missing value too.

    Raises
    ------
    DataError
        If a value to drop does not occur; a pattern of `drop_matching` may match nothing, and is then logged.
    """
    mask = np.zeros(len(obs), dtype=bool)
    for column, values in keys.drop.items():
        text = texts(column_of(obs, column, "keys.drop", where))
        present = set(text)
        for value in values:
            if value not in (*_MISSING, *present):
                raise DataError(f"{where}: keys.drop: no cell has {column} {value!r}; {_nearest(value, present)}")
        mask |= pd.Index(text).isin([*values, *([""] if set(values) & set(_MISSING) else [])])
    for column, patterns in keys.drop_matching.items():
        text = texts(column_of(obs, column, "keys.drop_matching", where))
        present = set(text)
        for pattern in patterns:
            hits = [value for value in present if re.fullmatch(pattern, value)]
            if not hits:
                log.warning("%s: keys.drop_matching: no %s matches %r", where, column, pattern)
            mask |= pd.Index(text).isin(hits)
    return mask


def _nearest(value: str, present: set[str]) -> str:
    """The nearest values, or the first few of very many."""
    text = suggest(value, present)
    return text if len(text) < 300 else f"{text[:300]} …"


def label_cells(obs: pd.DataFrame, keys: Keys, var: pd.DataFrame, where: str) -> np.ndarray:
    """Canonical perturbation of each cell (n_obs,)."""
    text = texts(column_of(obs, keys.perturbation, "keys.perturbation", where))
    genes = {*var.index, *var["symbol"]}
    return canonical_labels(text, keys, genes=genes, where=f"{where}: obs[{keys.perturbation!r}]")


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """Control cells, distinct perturbations (control included), singles and doubles."""
    sizes = [len(genes_of(name)) for name in pd.unique(labels)]
    return {
        "n_control": int((labels == CONTROL).sum()),
        "n_groups": len(sizes),
        "n_single": sizes.count(1),
        "n_double": sizes.count(2),
    }


def make_obs(obs: pd.DataFrame, labels: np.ndarray, keys: Keys, where: str) -> pd.DataFrame:
    """Cell table of `prepared.h5ad`: `perturbation`, `n_perturbed`, `context` and the columns of `keys.keep`.

    Raises
    ------
    DataError
        If a column is not there, a name is ours, or a cell has no context.
    """
    table = pd.DataFrame(index=pd.Index(obs.index.astype(str), dtype=object))
    table["perturbation"] = pd.Categorical(labels)
    table["n_perturbed"] = pd.Series(labels).map(lambda name: len(genes_of(name))).to_numpy(dtype=np.int64)
    context = np.full(len(obs), "all", dtype=object)
    if keys.context is not None:
        context = texts(column_of(obs, keys.context, "keys.context", where))
        lacking = int((context == "").sum())
        if lacking:
            raise DataError(
                f"{where}: obs[{keys.context!r}]: {lacking} cells have no context; drop them with "
                f"keys.drop: {{{keys.context}: ''}}"
            )
    table["context"] = pd.Categorical(context)
    for ours, column in keys.keep.items():
        if ours in RESERVED:
            raise DataError(f"{where}: keys.keep: {ours!r} is a name of ours; choose another for {column!r}")
        kept = column_of(obs, column, "keys.keep", where)
        numbers = pd.api.types.is_numeric_dtype(kept) or pd.api.types.is_bool_dtype(kept)
        text = texts(kept)
        text[kept.isna().to_numpy()] = None
        table[ours] = kept.to_numpy() if numbers else pd.Categorical(text)
    return table


def check_controls(table: pd.DataFrame, labels: np.ndarray, keys: Keys, where: str) -> None:
    """Check that every context has control cells.

    Parameters
    ----------
    table
        Cells that pass quality control.
    labels
        Canonical names of all cells, to say why there are none.

    Raises
    ------
    DataError
        Names the contexts, or the most frequent labels where there is no control at all.
    """
    is_control = (table["perturbation"] == CONTROL).to_numpy()
    if not is_control.any():
        if (labels == CONTROL).any():
            raise DataError(f"{where}: no control cell passes quality control; loosen the card's prepare section")
        shown = ", ".join(map(repr, pd.Series(labels).value_counts().index[:5]))
        raise DataError(
            f"{where}: no control cells: no label in obs[{keys.perturbation!r}] is one of keys.control "
            f"{list(keys.control)}; the most frequent are {shown}; name the label of controls there"
        )
    contexts = table["context"].astype(str).to_numpy()
    lacking = sorted(set(contexts) - set(contexts[is_control]))
    if lacking:
        names = sorted(set(table.loc[np.isin(contexts, lacking), "perturbation"].astype(str)))
        raise DataError(
            f"{where}: {len(lacking)} context(s) have perturbed cells but no control cells: "
            f"{', '.join(map(repr, lacking[:5]))} (perturbations {', '.join(names[:3])}"
            f"{' …' if len(names) > 3 else ''}); drop them with keys.drop: {{{keys.context}: [...]}}"
        )
