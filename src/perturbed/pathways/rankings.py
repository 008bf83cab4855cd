"""Rankings of genes and libraries of gene sets, joined by symbol."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.errors import ConfigError, DataError, suggest
from perturbed.pathways.gene_sets import read_gmt
from perturbed.pathways.spec import LISTS

COLUMNS = ("list", "group", "gene", "symbol", "score", "rank", "kept", "mean_expression")
_CASE_FACTOR = 5
"""A library whose symbols match so many times more genes when case is ignored is one of another organism."""


@dataclass(frozen=True)
class Library:
    """Gene sets as a matrix.

    Parameters
    ----------
    name
        Name of the library.
    pathways
        Names of its sets (n_sets,).
    symbols
        Its distinct genes, sorted (n_symbols,).
    membership
        1 where a gene is in a set (n_symbols + 1, n_sets); the last row is empty, for genes in no set.
    """

    name: str
    pathways: np.ndarray
    symbols: pd.Index
    membership: sparse.csr_matrix

    def find(self, symbols: Sequence[str] | np.ndarray) -> np.ndarray:
        """Rows of symbols in `membership`, −1 (the empty row) for those in no set."""
        return self.symbols.get_indexer(pd.Index(symbols))


@dataclass(frozen=True)
class Ranking:
    """One ranked list of one group, a gene per symbol, best first; genes that were not kept come last.

    Parameters
    ----------
    name, group
        List and group.
    symbols
        All genes (n_genes,).
    score
        Signed score (n_genes,); NaN where not kept.
    expression
        Mean expression (n_genes,).
    n_kept
        The first so many genes were kept.
    """

    name: str
    group: str
    symbols: np.ndarray
    score: np.ndarray
    expression: np.ndarray
    n_kept: int


def read_library(name: str, path: Path) -> Library:
    """A library of `perturbed gene-sets`."""
    sets = [one for one in read_gmt(path) if one.genes]
    if not sets:
        raise DataError(f"{path}: all its sets are empty")
    symbols = pd.Index(sorted({gene for one in sets for gene in one.genes}))
    rows = symbols.get_indexer(pd.Index([gene for one in sets for gene in one.genes]))
    columns = np.repeat(np.arange(len(sets)), [len(one.genes) for one in sets])
    matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(symbols) + 1, len(sets)))
    return Library(name, np.array([one.name for one in sets], dtype=object), symbols, matrix)


def read_rankings(path: Path, lists: Sequence[str], top: int) -> tuple[list[Ranking], pd.DataFrame]:
    """The rankings of these lists, group by group, and the genes left out because a better one has their symbol.

    Parameters
    ----------
    path
        `rankings.csv`: `COLUMNS`; `rank` is 1 for the largest |score| among the kept.
    lists
        Lists to read, in the order wanted.
    top
        Genes that will be taken from the top of each.

    Raises
    ------
    ConfigError
        If a list is unknown, or none of them is there. A list of `LISTS` that is absent is left out.
    DataError
        If the table is broken, or a ranking has no more than `top` genes to choose from.
    """
    table = _read_table(path)
    known = list(dict.fromkeys(table["list"]))
    for name in lists:
        if name not in known and name not in LISTS:
            raise ConfigError(f"enrich: lists: {path} has no list {name!r}; {suggest(name, known)}")
        if name not in known:
            print(f"perturbed: enrich: {path} has no list {name!r}; it is left out", file=sys.stderr)
    if not set(lists) & set(known):
        raise ConfigError(f"enrich: lists: {path} has none of {', '.join(lists)}; it has {', '.join(known)}")
    rankings, repeated = [], []
    for group in dict.fromkeys(table["group"]):
        for name in lists:
            rows = table[(table["list"] == name) & (table["group"] == group)]
            if rows.empty:
                continue  # a list may be undefined for a group, such as one without replicates
            rows = rows.sort_values(["kept", "rank", "gene"], ascending=[False, True, True], kind="stable")
            again = rows["symbol"].duplicated()
            repeated.append(rows[again])
            rankings.append(_ranking(rows[~again], name, group, top, path))
    return rankings, pd.concat(repeated, ignore_index=True)


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed score-genes`")
    texts = dict.fromkeys(("list", "group", "gene", "symbol"), str)
    numbers = {name: ["", "nan", "NaN"] for name in ("score", "rank", "mean_expression")}
    try:
        table = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=numbers)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as rankings ({error}); make it with `perturbed score-genes`") from None
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise DataError(f"{path}: lacks column {missing[0]!r}; make it with `perturbed score-genes`")
    words = [name for name in numbers if not pd.api.types.is_numeric_dtype(table[name])]
    if words:
        raise DataError(f"{path}: column {words[0]!r} must hold numbers; make it with `perturbed score-genes`")
    kept = table["kept"].astype(str).str.lower()
    if not kept.isin(("true", "false")).all():
        raise DataError(f"{path}: column kept must hold true or false")
    unnamed = table["symbol"].str.strip() == ""
    table = table.assign(kept=kept == "true", symbol=table["symbol"].mask(unnamed, table["gene"]))
    if table.duplicated(["list", "group", "gene"]).any():
        row = table[table.duplicated(["list", "group", "gene"])].iloc[0]
        raise DataError(f"{path}: gene {row['gene']!r} comes twice in list {row['list']!r}, group {row['group']!r}")
    broken = table["kept"] & table[["score", "rank", "mean_expression"]].isna().any(axis=1)
    if broken.any():
        row = table[broken].iloc[0]
        raise DataError(f"{path}: gene {row['gene']!r} of list {row['list']!r} is kept but lacks score, rank or mean")
    return table


def _ranking(rows: pd.DataFrame, name: str, group: str, top: int, path: Path) -> Ranking:
    n_kept = int(rows["kept"].sum())
    where = f"{path}: list {name!r}" + (f", group {group!r}" if group else "")
    if n_kept == 0:
        raise DataError(f"{where}: is empty, no gene was kept; check the filters of `perturbed score-genes`")
    if n_kept <= top:
        raise DataError(f"{where}: keeps {n_kept} genes, of which the top {top} would be all; lower `top`")
    return Ranking(
        name,
        group,
        rows["symbol"].to_numpy(dtype=object),
        rows["score"].to_numpy(dtype=float),
        rows["mean_expression"].to_numpy(dtype=float),
        n_kept,
    )


def check_match(library: Library, symbols: Sequence[str], path: Path) -> None:
    """Refuse a library that does not speak of these genes.

    Raises
    ------
    DataError
        If no gene is shared, or far more would be if case were ignored (the library of another organism).
    """
    known = set(symbols)
    shared = known.intersection(library.symbols)
    folded = {symbol.casefold() for symbol in known}
    shared_folded = [symbol for symbol in library.symbols if symbol.casefold() in folded]
    first = f"its first is {library.symbols[0]!r}, the rankings' first is {symbols[0]!r}"
    if len(shared_folded) > _CASE_FACTOR * len(shared):
        raise DataError(
            f"{path}: {len(shared)} of its {len(library.symbols)} genes are in the rankings, {len(shared_folded)} if "
            f"case is ignored ({first}); the species differ: give the card `orthologs`, or, where it is mere "
            "spelling, `ignore_case`"
        )
    if not shared:
        raise DataError(
            f"{path}: none of its {len(library.symbols)} genes is in the rankings ({first}); both must be symbols of "
            "one organism: make it with `perturbed gene-sets`"
        )
