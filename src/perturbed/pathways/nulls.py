"""Random lists of like expression: what enrichment a list shows merely because its genes are highly expressed.

Genes are binned by mean expression, and a random list takes from each bin as many genes as the list does. Its overlap
with a set is a sum of independent hypergeometric numbers, one per bin, so besides counting random lists the tail is
computed exactly; with one bin it is the ordinary test.
"""

from __future__ import annotations

import zlib

import numpy as np
from scipy import sparse, stats


def bin_genes(expression: np.ndarray, n_bins: int) -> np.ndarray:
    """Bin of each gene (n_genes,), by mean expression, as equal in number as can be; ties by position."""
    place = np.argsort(np.argsort(expression, kind="stable"), kind="stable")
    return (place * min(n_bins, len(place)) // len(place)).astype(int)


def make_rng(seed: int, *names: str) -> np.random.Generator:
    """Generator of one list, the same whichever other lists are tested."""
    return np.random.default_rng([seed, 61, zlib.crc32("\t".join(names).encode())])


def draw_lists(bins: np.ndarray, chosen: np.ndarray, n_draws: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """Random lists with as many genes of each bin as `chosen` has.

    Parameters
    ----------
    bins
        Bin of each gene (n_genes,).
    chosen
        Positions of the list's genes (n_list,); there may be none.
    n_draws
        Random lists.
    rng
        Generator.

    Returns
    -------
    sparse.csr_matrix
        1 where a gene is in a list (n_draws, n_genes).
    """
    wanted = np.bincount(bins[chosen], minlength=int(bins.max()) + 1)
    picked = []
    for i in np.flatnonzero(wanted):
        pool = np.flatnonzero(bins == i)
        keys = rng.random((n_draws, len(pool)))
        picked.append(pool[np.argsort(keys, axis=1, kind="stable")[:, : wanted[i]]])
    genes = np.concatenate([np.empty((n_draws, 0), dtype=int), *picked], axis=1)
    rows = np.repeat(np.arange(n_draws), genes.shape[1])
    return sparse.csr_matrix((np.ones(genes.size), (rows, genes.ravel())), shape=(n_draws, len(bins)))


def permute_within(values: np.ndarray, bins: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Values permuted among the genes of each bin (n_draws, n_genes)."""
    permuted = np.empty((n_draws, len(values)))
    for i in np.unique(bins):
        pool = np.flatnonzero(bins == i)
        permuted[:, pool] = rng.permuted(np.tile(values[pool], (n_draws, 1)), axis=1)
    return permuted


def matched_probability(
    overlap: np.ndarray, membership: sparse.csr_matrix, bins: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """Exact `P(X ≥ k)` for X the overlap of a random list of like expression with each set.

    `X = Σ_b X_b`, X_b hypergeometric with N_b genes in bin b, K_b of them in the set, n_b drawn; the distributions are
    convolved.

    Parameters
    ----------
    overlap
        k (n_sets,).
    membership
        1 where a gene is in a set (n_genes, n_sets).
    bins
        Bin of each gene (n_genes,).
    chosen
        Positions of the list's genes (n_list,).

    Returns
    -------
    np.ndarray
        (n_sets,)
    """
    n_bins, n_sets = int(bins.max()) + 1, membership.shape[1]
    one_hot = sparse.csr_matrix((np.ones(len(bins)), (bins, np.arange(len(bins)))), shape=(n_bins, len(bins)))
    in_set = (one_hot @ membership).toarray().astype(int)
    n_in_bin, n_drawn = np.bincount(bins, minlength=n_bins), np.bincount(bins[chosen], minlength=n_bins)
    total = np.ones((n_sets, 1))
    for b in np.flatnonzero(n_drawn):
        distinct, which = np.unique(in_set[b], return_inverse=True)
        most = int(min(n_drawn[b], distinct.max()))
        mass = stats.hypergeom.pmf(np.arange(most + 1)[None, :], n_in_bin[b], distinct[:, None], n_drawn[b])
        part = np.asarray(mass)[which]
        longer = np.zeros((n_sets, total.shape[1] + most))
        for j in range(most + 1):
            longer[:, j : j + total.shape[1]] += part[:, [j]] * total
        total = longer
    tail = np.cumsum(total[:, ::-1], axis=1)[:, ::-1]  # summed from the small end, so that small tails stay exact
    inside = np.minimum(overlap, tail.shape[1] - 1)
    return np.minimum(np.where(overlap < tail.shape[1], tail[np.arange(n_sets), inside], 0.0), 1.0)


def count_as_good(observed: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Empirical p value `(1 + #{random ≥ observed}) / (1 + n)` of each set (n_sets,), random (n_draws, n_sets)."""
    better = (random >= observed[None, :] - 1e-9).sum(axis=0)
    return (1 + better) / (1 + len(random))


def pool_rates(p: np.ndarray, random_p: np.ndarray) -> np.ndarray:
    """Empirical false discovery rate of each set: null sets as good as it per random list, over observed ones.

    `min over q ≥ p of mean_draws #{p_null ≤ q} / #{p_obs ≤ q}`, at most 1. The null is pooled over sets, so that it
    resolves rates that no set's own random lists could.

    Parameters
    ----------
    p
        Observed p values (n_sets,).
    random_p
        Those of random lists (n_draws, n_sets).
    """
    order = np.argsort(p, kind="stable")
    level = p[order] * (1 + 1e-9)
    observed = np.searchsorted(p[order], level, side="right")
    expected = np.searchsorted(np.sort(random_p, axis=None), level, side="right") / len(random_p)
    rates = np.minimum.accumulate((expected / observed)[::-1])[::-1]
    result = np.empty_like(p)
    result[order] = np.minimum(rates, 1.0)
    return result
