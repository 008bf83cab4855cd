"""Gene ids: tables that translate them, the data's own table of genes, and what becomes of each id of a library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from perturbed.errors import ConfigError, DataError
from perturbed.pathways.spec import GeneSetCard, IdTable

SYMBOL_COLUMNS = ("symbol", "feature_name", "gene_symbol")
ID_COLUMNS = ("gene", "gene_id", "feature_id", "ensembl")
_VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fate:
    """What became of one id: its symbols (none where it is lost), and whether a step offered several."""

    symbols: tuple[str, ...]
    ambiguous: bool


def read_id_table(table: IdTable, path: Path) -> dict[str, tuple[str, ...]]:
    """Targets of every id, sorted; rows that lack either are skipped.

    Raises
    ------
    DataError
        If the file cannot be read, lacks a column, or holds no pair.
    """
    header = 0 if isinstance(table.source_column, str) else None
    try:
        rows = pd.read_csv(path, sep=table.separator, header=header, dtype=str, keep_default_na=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of gene ids ({error}); check separator and file") from None
    for column in (table.source_column, table.target_column):
        if column not in rows.columns:
            known = ", ".join(map(str, rows.columns[:8]))
            raise DataError(f"{path}: no column {column!r} (there are {known}); correct the card's columns")
    pairs = pd.DataFrame({"source": rows[table.source_column], "target": rows[table.target_column]})
    pairs = pairs.apply(lambda column: column.str.strip())
    pairs = pairs[(pairs["source"] != "") & (pairs["target"] != "") & (pairs["target"] != "-")].drop_duplicates()
    if pairs.empty:
        raise DataError(f"{path}: holds no pair of ids; check separator and columns in the card")
    pairs["source"] = pairs["source"].map(drop_version)
    return {str(name): tuple(sorted(set(part))) for name, part in pairs.groupby("source")["target"]}


def read_gene_table(path: Path) -> pd.DataFrame:
    """Genes of the data, from a csv or the `var` of an h5ad.

    Returns
    -------
    pandas.DataFrame
        Columns `gene` (stable id; the symbol where the table has none) and `symbol`.

    Raises
    ------
    DataError
        If it is neither, or has no column of symbols.
    """
    try:
        rows = _read_var(path) if path.suffix == ".h5ad" else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as a table of genes ({error}); give a csv or an h5ad") from None
    symbols = next((column for column in SYMBOL_COLUMNS if column in rows), None)
    if symbols is None:
        raise DataError(f"{path}: no column of symbols; name one {' or '.join(SYMBOL_COLUMNS)}")
    ids = next((column for column in ID_COLUMNS if column in rows), symbols)
    table = pd.DataFrame({"gene": rows[ids].map(drop_version), "symbol": rows[symbols].str.strip()})
    return table[table["symbol"] != ""].drop_duplicates(ignore_index=True)


def _read_var(path: Path) -> pd.DataFrame:
    import h5py
    from anndata.io import read_elem

    with h5py.File(path, "r") as file:
        var = read_elem(file["var"])
    return var.astype(str).assign(gene=var.index.astype(str))


def drop_version(name: str) -> str:
    """An Ensembl gene id without its version; anything else as it is."""
    found = _VERSION.match(name)
    return found.group(1) if found else name


def resolve(
    card: GeneSetCard,
    ids: Iterable[str],
    ids_to_symbols: Table | None,
    orthologs: Table | None,
    genes: pd.DataFrame | None,
) -> dict[str, Fate]:
    """Follow each id through the card's map, the orthologs and the data's spelling.

    Parameters
    ----------
    card
        The library's card.
    ids
        The library's ids.
    ids_to_symbols
        The card's map; None for symbols, and for Ensembl ids that the data's table translates.
    orthologs
        Symbols of the library's organism to symbols of the data's; None where they are the same.
    genes
        The data's genes (`read_gene_table`), or None.

    Raises
    ------
    ConfigError
        If the card needs the data's genes and there are none.
    """
    if card.ids == "ensembl" and ids_to_symbols is None:
        if genes is None:
            raise ConfigError("gene sets: Ensembl ids need the card's `map`, or the data's genes (--var-table)")
        ids_to_symbols = {str(name): tuple(sorted(set(part))) for name, part in genes.groupby("gene")["symbol"]}
    steps: list[tuple[Table, bool]] = []
    if ids_to_symbols is not None:
        steps.append((ids_to_symbols, card.map is None or card.map.many == "all"))
    if orthologs is not None:
        steps.append((orthologs, card.orthologs is None or card.orthologs.many == "all"))
    spelling = _spellings(card, genes)
    return {name: _follow(drop_version(name), steps, spelling) for name in ids}


def _follow(name: str, steps: list[tuple[Table, bool]], spelling: Mapping[str, str] | None) -> Fate:
    symbols, ambiguous = {name}, False
    for table, all_targets in steps:
        after: set[str] = set()
        for symbol in symbols:
            targets = table.get(symbol, ())
            ambiguous |= len(targets) > 1
            if len(targets) == 1 or all_targets:
                after.update(targets)
        symbols = after
    if spelling is not None:
        symbols = {spelling.get(symbol, spelling.get(symbol.casefold(), symbol)) for symbol in symbols}
    return Fate(tuple(sorted(symbols)), ambiguous)


def _spellings(card: GeneSetCard, genes: pd.DataFrame | None) -> dict[str, str] | None:
    """The data's symbols, by themselves and, where no two differ in case only, by their case-folded form."""
    if not card.ignore_case:
        return None
    if genes is None:
        raise ConfigError("gene sets: `ignore_case` needs the data's genes (--var-table), whose spelling is taken")
    symbols = pd.Series(sorted(set(genes["symbol"])), dtype=str)
    folded = symbols.str.casefold()
    alone = symbols[~folded.duplicated(keep=False)]
    return {symbol.casefold(): symbol for symbol in alone} | {symbol: symbol for symbol in symbols}
