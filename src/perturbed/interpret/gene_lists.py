"""Lists of genes against gene sets: the hypergeometric test, and as a null random lists of equal expression."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse, stats

from perturbed.errors import DataError
from perturbed.interpret.spec import ProgramSpec

COLUMNS = (
    "program",
    "gene_set",
    "n_set",
    "n_list",
    "n_overlap",
    "expected",
    "p_value",
    "fdr",
    "p_random_lists",
    "genes",
)


def read_gene_sets(path: str | Path, genes: Sequence[str], spec: ProgramSpec) -> dict[str, tuple[str, ...]]:
    """Gene sets of a GMT file (may be gzipped), each cut to `genes`, where enough of them are left.

    Raises
    ------
    DataError
        If the file cannot be read, a line is no gene set, or no set is left.
    """
    path = Path(path)
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as gene sets ({error}); it must be a GMT file, correct the path"
        ) from None
    known, sets = set(genes), {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\n").split("\t")
        if len(rest) < 2:
            raise DataError(f"{path}: line {number} is no gene set; a GMT line is name, description, genes, by tabs")
        members = tuple(sorted(known.intersection(gene.partition(",")[0].strip() for gene in rest[1:])))
        if spec.min_set <= len(members) <= spec.max_set:
            sets[name] = members
    if not sets:
        raise DataError(
            f"{path}: no set holds {spec.min_set} to {spec.max_set} of the model's {len(known)} genes; check that both "
            "use the same gene names, or set min_set and max_set"
        )
    return sets


def enrich_lists(
    lists: Mapping[str, Sequence[str]],
    sets: Mapping[str, Sequence[str]],
    genes: Sequence[str],
    expression: np.ndarray,
    spec: ProgramSpec,
) -> pd.DataFrame:
    """Every list against every set.

    With N genes, K of them in the set, n in the list and k in both, `p_value = P(X ≥ k)`, X hypergeometric(N, K, n);
    the background is the model's own genes. `fdr` is Benjamini and Hochberg's over all rows. `p_random_lists` is the
    share of random lists, drawn in bins of equal expression, whose best set is as good as this one: it allows for the
    number of sets, for their overlap and for the ease with which expressed genes are found.

    Parameters
    ----------
    lists, sets
        Genes by name; all of them among `genes`.
    genes
        Background (n_genes,).
    expression
        Mean expression of each (n_genes,).
    spec
        Bins, permutations and seed.

    Returns
    -------
    pd.DataFrame
        Sorted by program, then p value; columns `COLUMNS`.
    """
    place = pd.Index(genes)
    names = list(sets)
    membership = _membership([place.get_indexer(pd.Index(sets[name])) for name in names], len(genes))
    sizes = np.asarray(membership.sum(axis=0)).ravel().astype(int)
    bins = _bins(expression, spec.n_bins)
    rows, nulls = [], {}
    for program, members in lists.items():
        chosen = place.get_indexer(pd.Index(members))
        p_values, overlap = _p_values(membership, sizes, chosen[None, :], len(genes))
        key = (len(chosen), tuple(np.bincount(bins[chosen], minlength=bins.max() + 1)))
        if key not in nulls:
            nulls[key] = _best_of_random(membership, sizes, bins, np.array(key[1]), spec)
        random = np.searchsorted(nulls[key], p_values[0] * (1 + 1e-12), side="right")
        for i, name in enumerate(names):
            both = sorted(set(members) & set(sets[name]))
            rows.append(
                (program, name, sizes[i], len(chosen), int(overlap[0, i]), sizes[i] * len(chosen) / len(genes),
                 p_values[0, i], np.nan, (1 + random[i]) / (1 + spec.n_permutations), " ".join(both))
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if len(table):
        table["fdr"] = stats.false_discovery_control(table["p_value"])
    return table.sort_values(["program", "p_value", "gene_set"], kind="stable", ignore_index=True)


def _membership(sets: Sequence[np.ndarray], n_genes: int) -> sparse.csr_matrix:
    """1 where a gene is in a set (n_genes, n_sets)."""
    rows = np.concatenate(sets)
    columns = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(n_genes, len(sets)))


def _p_values(
    membership: sparse.csr_matrix, sizes: np.ndarray, lists: np.ndarray, n_genes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Upper tail and overlap of lists (n_lists, n_list) with every set, each (n_lists, n_sets)."""
    n_lists, n_list = lists.shape
    flat = (np.ones(lists.size), (np.repeat(np.arange(n_lists), n_list), lists.ravel()))
    overlap = (sparse.csr_matrix(flat, shape=(n_lists, n_genes)) @ membership).toarray().astype(int)
    distinct, which = np.unique(sizes, return_inverse=True)
    tail = np.asarray(stats.hypergeom.sf(np.arange(n_list + 1)[None, :] - 1, n_genes, distinct[:, None], n_list))
    return tail[which[None, :], overlap], overlap


def _best_of_random(
    membership: sparse.csr_matrix, sizes: np.ndarray, bins: np.ndarray, n_in_bin: np.ndarray, spec: ProgramSpec
) -> np.ndarray:
    """Smallest p value over the sets of each random list, ascending (n_permutations,)."""
    rng = np.random.default_rng([spec.seed, 51])
    pools = [np.flatnonzero(bins == i) for i in range(len(n_in_bin))]
    best = np.empty(spec.n_permutations)
    for i in range(spec.n_permutations):
        drawn = np.concatenate([rng.choice(pool, n, replace=False) for pool, n in zip(pools, n_in_bin)])
        best[i] = _p_values(membership, sizes, drawn[None, :], len(bins))[0].min()
    return np.sort(best)


def _bins(expression: np.ndarray, n_bins: int) -> np.ndarray:
    """Bin of equal numbers of genes by mean expression (n_genes,)."""
    rank = np.argsort(np.argsort(expression, kind="stable"), kind="stable")
    return (rank * min(n_bins, len(rank)) // len(rank)).astype(int)
