"""Tests of gene sets, all sets and all lists at once: over-representation, ranks, and GSEA's running sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import sparse, stats


def tail_probability(overlap: np.ndarray, sizes: np.ndarray, n_list: int, n_background: int) -> np.ndarray:
    """`P(X ≥ k)` for X hypergeometric: N genes, K of them in the set, n drawn, k in both.

    Parameters
    ----------
    overlap
        k, integers (n_lists, n_sets).
    sizes
        K (n_sets,).
    n_list, n_background
        n and N.

    Returns
    -------
    np.ndarray
        (n_lists, n_sets)
    """
    distinct, which = np.unique(sizes, return_inverse=True)
    k = np.arange(int(overlap.max(initial=0)) + 1)
    tail = np.asarray(stats.hypergeom.sf(k[None, :] - 1, n_background, distinct[:, None], n_list))
    return np.minimum(tail, 1.0)[which[None, :], overlap]


def adjust(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's false discovery rates (n,)."""
    return np.asarray(stats.false_discovery_control(p)) if len(p) else p


def count_rejections(p: np.ndarray, level: float) -> np.ndarray:
    """How many p values of each row (n_lists, n_sets) have a Benjamini–Hochberg rate of at most `level` (n_lists,)."""
    n = p.shape[1]
    below = np.sort(p, axis=1) * n <= level * np.arange(1, n + 1) * (1 + 1e-12)
    return np.where(below.any(axis=1), n - np.argmax(below[:, ::-1], axis=1), 0)


def rank_values(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the largest value last, ties at their mean (n_genes,)."""
    return np.asarray(stats.rankdata(values), dtype=float)


def standardise_rank_sums(
    sums: np.ndarray, ranks: np.ndarray, membership: sparse.csr_matrix, bins: np.ndarray
) -> np.ndarray:
    """Rank sums of sets in standard deviations of their permutation null, genes permuted within bins.

    With K_b of the N_b genes of bin b in the set, mean rank r̄_b and variance S²_b (N_b − 1 below), the sum over the set
    has mean `Σ K_b r̄_b` and variance `Σ K_b (N_b − K_b) S²_b / N_b`. One bin gives the Mann–Whitney test with its
    correction for ties. Genes of a set that go together make the true variance larger.

    Parameters
    ----------
    sums
        Rank sums (n_lists, n_sets).
    ranks
        Ranks of the genes (n_genes,).
    membership
        1 where a gene is in a set (n_genes, n_sets).
    bins
        Bin of each gene (n_genes,).

    Returns
    -------
    np.ndarray
        z (n_lists, n_sets); 0 where the sum cannot vary.
    """
    one_hot = sparse.csr_matrix((np.ones(len(bins)), (bins, np.arange(len(bins)))))
    n_in_bin = np.asarray(one_hot.sum(axis=1)).ravel()
    mean = np.bincount(bins, ranks) / n_in_bin
    squares = np.bincount(bins, np.square(ranks - mean[bins]))
    spread = squares / np.maximum(n_in_bin - 1, 1)
    in_set = (one_hot @ membership).toarray()
    variance = (in_set * (n_in_bin[:, None] - in_set) * (spread / n_in_bin)[:, None]).sum(axis=0)
    off = sums - mean @ in_set
    return np.divide(off, np.sqrt(variance), out=np.zeros_like(off), where=variance > 1e-9)


def rank_probability(z: np.ndarray, signed: bool) -> np.ndarray:
    """Normal p value of z: upper tail, or both where the score has a sign."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)) if signed else stats.norm.sf(z))


def run_gsea(scores: pd.Series, sets: Mapping[str, Sequence[str]], n_permutations: int, seed: int) -> pd.DataFrame:
    """GSEA's prerank (gseapy): columns `ratio` (normalised enrichment score), `p`, `fdr`; index: the sets' names.

    Its null permutes genes, as that of `rank`; a p value of 0 means less than 1 / permutations and is given as that.

    Parameters
    ----------
    scores
        Score by symbol, distinct.
    sets
        Genes by set, all of them among `scores`.
    n_permutations, seed
        Gene permutations and their seed.
    """
    import gseapy

    ordered = scores.sort_index().sort_values(ascending=False, kind="stable")
    result = gseapy.prerank(
        rnk=ordered, gene_sets={name: list(genes) for name, genes in sets.items()}, min_size=1, max_size=len(ordered),
        permutation_num=n_permutations, seed=seed, threads=1, outdir=None, no_plot=True, verbose=False,
    )  # fmt: skip
    table = result.res2d.set_index("Term")[["NES", "NOM p-val", "FDR q-val"]].astype(float)
    table = table.set_axis(["ratio", "p", "fdr"], axis=1).reindex(list(sets))
    return table.assign(p=table["p"].clip(lower=1 / (1 + n_permutations)))
