"""Ranked lists of genes against libraries of gene sets, each number beside that of random lists of like expression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.errors import ConfigError, DataError
from perturbed.files import atomic
from perturbed.pathways.identifiers import read_gene_table
from perturbed.pathways.nulls import (
    bin_genes,
    count_as_good,
    draw_lists,
    make_rng,
    matched_probability,
    permute_within,
    pool_rates,
)
from perturbed.pathways.rankings import Library, Ranking, check_match, read_library, read_rankings
from perturbed.pathways.spec import EnrichmentSpec
from perturbed.pathways.statistics import (
    adjust,
    count_rejections,
    rank_probability,
    rank_values,
    run_gsea,
    standardise_rank_sums,
    tail_probability,
)
from perturbed.pathways.tables import (
    COUNTS,
    ENRICHMENT,
    KEYS,
    choose_top,
    find_planted,
    score_planted,
    tabulate_libraries,
    tabulate_lost,
)


@dataclass(frozen=True)
class _Trial:
    """One ranking against one library on one background.

    `pool` holds the genes that random lists are drawn from, best first: those kept, in the background and, where only
    annotated genes count, in some set. `membership` (n_pool, n_sets) and `sizes` (n_sets,) are of the tested sets;
    `chosen` are the list's positions in the pool, `bins` the pool's bins of expression.
    """

    ranking: Ranking
    pathways: np.ndarray
    pool: np.ndarray
    membership: sparse.csr_matrix
    sizes: np.ndarray
    chosen: np.ndarray
    bins: np.ndarray
    n_background: int

    def overlap(self) -> np.ndarray:
        """Genes of the list in each set (n_sets,)."""
        return np.asarray(self.membership[self.chosen].sum(axis=0)).ravel().astype(int)

    def genes(self) -> list[str]:
        """The list's genes in each set, best first, joined by semicolons."""
        columns = self.membership[self.chosen].tocsc()
        columns.sort_indices()
        names = self.ranking.symbols[self.pool[self.chosen]]
        bounds = zip(columns.indptr[:-1], columns.indptr[1:])
        return [";".join(names[columns.indices[start:end]]) for start, end in bounds]


def write_enrichment(
    rankings: Path,
    libraries: Mapping[str, Path],
    spec: EnrichmentSpec,
    out: Path,
    *,
    top: int,
    genome: Path | None = None,
    planted: Sequence[str] = (),
) -> None:
    """Test every list of `spec.lists` against every library and write a folder of tables.

    `enrichment.csv` holds a row per library, list, group, pathway, method and background; `counts.csv` how many are
    significant, beside how many are with random lists; `top.csv` the first pathways of each list, by FDR, then p, of
    those with any of the list's genes (WebGestalt's order); `libraries.csv` and `lost.csv` what the libraries and the
    model do not share; `planted.csv` how well planted pathways are found.

    Parameters
    ----------
    rankings
        `rankings.csv`.
    libraries
        GMT files by name, of `perturbed gene-sets`.
    spec
        Options.
    out
        Folder, written whole or not at all.
    top
        Genes of each list.
    genome
        csv with the genes of the background `genome`; None takes all genes of the library.
    planted
        Planted pathways: names, or beginnings of names.

    Raises
    ------
    PerturbedError
        If a file is broken, a list unknown or too short, a library of another organism, or a planted name in no
        library.
    """
    if not libraries:
        raise ConfigError("enrich: no library; give at least one --gene-sets NAME=PATH")
    ranked, repeated = read_rankings(rankings, spec.lists, top)
    genes = None if genome is None else sorted(set(read_gene_table(genome)["symbol"]))
    symbols = list(dict.fromkeys(symbol for one in ranked for symbol in one.symbols))
    rows: dict[str, list[pd.DataFrame]] = {"enrichment": [], "counts": [], "lost": [], "libraries": []}
    pathways: dict[str, None] = {}
    for name, path in libraries.items():
        library = read_library(name, path)
        check_match(library, symbols, path)
        pathways |= dict.fromkeys(library.pathways)
        rows["lost"].append(tabulate_lost(library, symbols, repeated))
        rows["libraries"].append(tabulate_libraries(library, symbols))
        for ranking in ranked:
            for enriched, counts in run_tests(ranking, library, spec, top, genes):
                rows["enrichment"].append(enriched)
                rows["counts"].append(counts)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in rows.items()}
    tables["top"] = choose_top(tables["enrichment"], spec.top)
    if planted:
        tables["planted"] = score_planted(tables["enrichment"], find_planted(planted, list(pathways)), spec.fdr)
    _write(tables, out)


def _write(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    with atomic(out) as part:
        part.mkdir()
        for name, table in tables.items():
            table.to_csv(part / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def run_tests(
    ranking: Ranking, library: Library, spec: EnrichmentSpec, top: int, genome: Sequence[str] | None
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Every method and background of the spec: rows of `enrichment.csv` and of `counts.csv`."""
    for method in spec.methods:
        for background in spec.backgrounds if method == "ora" else ("model",):
            trial = _set_up(ranking, library, spec, top, background, genome, ranked=method != "ora")
            test = {"ora": _over_represent, "rank": _rank, "gsea": _gsea}[method]
            table, null_counts = test(trial, library, spec)
            keys = dict(zip(KEYS, (library.name, ranking.name, ranking.group, method, background)))
            table = table.assign(pathway=trial.pathways, set_size=trial.sizes, genes=trial.genes(), **keys)
            table = table.assign(overlap=trial.overlap(), expected=len(trial.chosen) * trial.sizes / trial.n_background)
            sorted_ = table.assign(_down=-table["ratio"]).sort_values(["p", "_down", "pathway"], kind="stable")
            counts = {**keys, "n_top": top, "n_list": len(trial.chosen), "n_background": trial.n_background}
            yield sorted_[list(ENRICHMENT)], _count(table, null_counts, counts, spec)


def _set_up(
    ranking: Ranking,
    library: Library,
    spec: EnrichmentSpec,
    top: int,
    background: str,
    genome: Sequence[str] | None,
    *,
    ranked: bool,
) -> _Trial:
    """Pool, background, set sizes and the list's place among them; tests of ranks take the pool as background."""
    rows = library.find(ranking.symbols)
    usable = np.ones(len(rows), dtype=bool)
    if background == "genome" and genome is not None:
        usable = pd.Index(genome).get_indexer(pd.Index(ranking.symbols)) >= 0
    if spec.annotated_only:
        usable &= rows >= 0
    kept = usable & (np.arange(len(rows)) < ranking.n_kept)
    if not kept.any():
        raise DataError(f"{library.name}: no kept gene of list {ranking.name!r} is in a set of the library")
    if background == "genome":
        everything = library.find(_universe(ranking, library, spec, genome))
    else:
        everything = rows[usable if spec.model_genes == "all" and not ranked else kept]
    sizes = np.asarray(library.membership[everything].sum(axis=0)).ravel().astype(int)
    tested = np.flatnonzero((sizes >= spec.min_size) & (sizes <= spec.max_size))
    if not len(tested):
        raise DataError(
            f"{library.name}: no set has {spec.min_size} to {spec.max_size} of the {len(everything)} background genes; "
            "set min_size and max_size"
        )
    pool = np.flatnonzero(kept)
    return _Trial(
        ranking=ranking,
        pathways=library.pathways[tested],
        pool=pool,
        membership=library.membership[rows[pool]][:, tested],
        sizes=sizes[tested],
        chosen=np.flatnonzero(pool < top),
        bins=bin_genes(ranking.expression[pool], spec.n_bins),
        n_background=len(everything),
    )


def _universe(ranking: Ranking, library: Library, spec: EnrichmentSpec, genome: Sequence[str] | None) -> list[str]:
    """Genes of the background `genome`: the given ones, else all of the library."""
    if genome is None:
        return sorted(set(library.symbols) | (set() if spec.annotated_only else set(ranking.symbols)))
    return sorted(set(genome) & set(library.symbols) if spec.annotated_only else set(genome))


# --- the tests --------------------------------------------------------------------------------------------------------


def _over_represent(trial: _Trial, library: Library, spec: EnrichmentSpec) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Over-representation: ratio = overlap / expected, expected = list × set / background, hypergeometric tail."""
    rng = make_rng(spec.seed, library.name, trial.ranking.name, trial.ranking.group)
    overlap, n_list = trial.overlap(), len(trial.chosen)
    random = draw_lists(trial.bins, trial.chosen, spec.n_null, rng)
    random_overlap = (random @ trial.membership).toarray().astype(int)
    p = tail_probability(overlap[None, :], trial.sizes, n_list, trial.n_background)[0]
    random_p = tail_probability(random_overlap, trial.sizes, n_list, trial.n_background)
    expected = n_list * trial.sizes / trial.n_background
    matched = matched_probability(overlap, trial.membership, trial.bins, trial.chosen)
    table = _tabulate(
        np.divide(overlap, expected, out=np.full(len(p), np.nan), where=expected > 0),
        p, adjust(p), count_as_good(overlap, random_overlap), pool_rates(p, random_p), matched,
    )  # fmt: skip
    return table, count_rejections(random_p, spec.fdr)


def _rank(trial: _Trial, library: Library, spec: EnrichmentSpec) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Mann–Whitney test of the set's genes against the others; ratio = 2 AUC, so that 1 is chance.

    It takes genes as independent. Genes of a pathway are not, so its p values are too small; the null of permuted genes
    shares that fault, and only corrects for expression.
    """
    rng = make_rng(spec.seed, library.name, trial.ranking.name, trial.ranking.group, "rank")
    signed = spec.rank_by == "signed"
    score = trial.ranking.score[trial.pool]
    ranks = rank_values(score if signed else np.abs(score))
    permuted = permute_within(ranks, trial.bins, spec.n_null, rng)
    sums = ranks[None, :] @ trial.membership
    random_sums = permuted @ trial.membership
    whole = np.zeros(len(ranks), dtype=int)
    z = standardise_rank_sums(sums, ranks, trial.membership, whole)[0]
    random_z = standardise_rank_sums(random_sums, ranks, trial.membership, whole)
    matched_z = standardise_rank_sums(sums, ranks, trial.membership, trial.bins)[0]
    others = len(ranks) - trial.sizes
    area = (sums[0] - trial.sizes * (trial.sizes + 1) / 2) / np.maximum(trial.sizes * others, 1)
    p = rank_probability(z, signed)
    random_p = rank_probability(random_z, signed)
    empirical = count_as_good(np.abs(z), np.abs(random_z)) if signed else count_as_good(z, random_z)
    matched = rank_probability(matched_z, signed)
    table = _tabulate(2 * area, p, adjust(p), empirical, pool_rates(p, random_p), matched)
    return table, count_rejections(random_p, spec.fdr)


def _gsea(trial: _Trial, library: Library, spec: EnrichmentSpec) -> tuple[pd.DataFrame, np.ndarray | None]:
    """GSEA; its own permutations are the null, so nothing is matched to expression."""
    score = trial.ranking.score[trial.pool]
    names = trial.ranking.symbols[trial.pool]
    scores = pd.Series(score if spec.rank_by == "signed" else np.abs(score), index=names)
    columns = trial.membership.tocsc()
    bounds = zip(columns.indptr[:-1], columns.indptr[1:])
    sets = {pathway: names[columns.indices[a:b]] for pathway, (a, b) in zip(trial.pathways, bounds)}
    found = run_gsea(scores, sets, spec.n_permutations, spec.seed)
    blank = np.full(len(found), np.nan)
    table = _tabulate(found["ratio"].to_numpy(), found["p"].to_numpy(), found["fdr"].to_numpy(), blank, blank, None)
    return table, None


def _tabulate(
    ratio: np.ndarray,
    p: np.ndarray,
    fdr: np.ndarray,
    empirical: np.ndarray,
    rates: np.ndarray,
    matched: np.ndarray | None,
) -> pd.DataFrame:
    table = pd.DataFrame({"ratio": ratio, "p": p, "fdr": fdr, "empirical_p": empirical, "empirical_fdr": rates})
    if matched is None:
        return table.assign(matched_p=np.nan, matched_fdr=np.nan)
    return table.assign(matched_p=matched, matched_fdr=adjust(matched))


def _count(
    table: pd.DataFrame, null_counts: np.ndarray | None, keys: Mapping[str, Any], spec: EnrichmentSpec
) -> pd.DataFrame:
    """How many pathways are significant, and how many are with random lists (mean, 95 % range, p value)."""
    n = int((table["fdr"] <= spec.fdr).sum())
    row = {**keys, "n_tested": len(table), "n_significant": n}
    row |= {"n_matched": int((table["matched_fdr"] <= spec.fdr).sum())}
    row |= {"n_empirical": int((table["empirical_fdr"] <= spec.fdr).sum())}
    if null_counts is not None:
        low, high = np.quantile(null_counts, [0.025, 0.975], method="inverted_cdf")
        row |= {"expected": null_counts.mean(), "expected_low": low, "expected_high": high}
        row["p"] = (1 + (null_counts >= n).sum()) / (1 + len(null_counts))
    else:
        row |= {"n_matched": np.nan, "n_empirical": np.nan}
    return pd.DataFrame([row]).reindex(columns=list(COUNTS))
