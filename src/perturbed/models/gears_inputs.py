"""What GEARS is given: conditions in its spelling, and the graph of genes from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbed.errors import DataError, MethodError
from perturbed.names import genes_of

MOST_GENES = 2
"""GEARS names a condition by one or two genes."""


def gears_label(perturbation: str) -> str:
    """GEARS' spelling of a canonical name, the same for every order of its genes.

    >>> [gears_label(name) for name in ("control", "KLF1", "KLF1+BAK1", "BAK1+KLF1")]
    ['ctrl', 'KLF1+ctrl', 'BAK1+KLF1', 'BAK1+KLF1']

    Raises
    ------
    MethodError
        If there are more than two genes, or a gene's name holds `ctrl`, by which GEARS knows a single.
    """
    genes = sorted(genes_of(perturbation))
    if len(genes) > MOST_GENES:
        raise MethodError(f"GEARS names a condition by one or two genes, {perturbation} has {len(genes)}")
    odd = [gene for gene in genes if "ctrl" in gene]
    if odd:
        raise MethodError(f"GEARS takes {odd[0]!r} for a control, since the name holds `ctrl`; rename it in the card")
    return "ctrl" if not genes else "+".join([*genes, "ctrl"][:2])


def read_gene_graph(path: str | Path, n_neighbours: int) -> pd.DataFrame:
    """The strongest edges into each gene of a graph file.

    Parameters
    ----------
    path
        CSV (may be gzipped) with the columns `source`, `target`, `importance`; an edge carries from source to target.
    n_neighbours
        Edges kept per target, ties by the source's name. Loops are left out; the network adds its own.

    Returns
    -------
    pd.DataFrame
        `source`, `target`, `importance`, sorted by target, then by falling importance.

    Raises
    ------
    DataError
        If a column is missing, an importance is no positive number, or there is no edge.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a gene graph ({error}); it must be a CSV") from None
    missing = [column for column in ("source", "target", "importance") if column not in table]
    if missing:
        raise DataError(f"{path}: column {missing[0]!r} is missing; a gene graph has source, target, importance")
    table = table[["source", "target", "importance"]].astype({"source": str, "target": str})
    weight = pd.to_numeric(table["importance"], errors="coerce")
    bad = ~(np.isfinite(weight) & (weight > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(f"{path}: row {row + 1}: importance {table['importance'].iloc[row]!r} is no positive number")
    table = table.assign(importance=weight)[table["source"] != table["target"]]
    table = table.sort_values(["target", "importance", "source"], ascending=[True, False, True])
    table = table.drop_duplicates(["source", "target"]).groupby("target", sort=False).head(n_neighbours)
    if table.empty:
        raise DataError(f"{path}: holds no edge between two genes")
    return table.reset_index(drop=True)


def graph_tensors(graph: pd.DataFrame, nodes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Edges as positions among `nodes` (2, n_edges), from source to target, and their weights (n_edges,)."""
    place = pd.Index(nodes)
    edges = np.stack([place.get_indexer(pd.Index(graph[column])) for column in ("source", "target")])
    return torch.from_numpy(edges.astype(np.int64)), torch.from_numpy(graph["importance"].to_numpy(dtype=np.float32))
