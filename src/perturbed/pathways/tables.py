"""What is written of an enrichment beside its p values: the first pathways, what was lost, what was planted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from perturbed.errors import ConfigError, suggest
from perturbed.pathways.rankings import Library

KEYS = ("library", "list", "group", "method", "background")
ENRICHMENT = (
    "library", "list", "group", "pathway", "method", "background", "set_size", "overlap", "expected", "ratio", "p",
    "fdr", "empirical_p", "empirical_fdr", "matched_p", "matched_fdr", "genes",
)  # fmt: skip
"""Columns of `enrichment.csv`. `fdr`: Benjamini and Hochberg's over the library. `empirical_p`: share of random lists
of like expression that do as well; `empirical_fdr`: the same pooled over pathways. `matched_p`: that share exactly
(`ora`) or by the normal law (`rank`); `matched_fdr`: its Benjamini–Hochberg rate."""
COUNTS = (
    *KEYS, "n_top", "n_list", "n_background", "n_tested", "n_significant", "expected", "expected_low", "expected_high",
    "p", "n_matched", "n_empirical",
)  # fmt: skip
"""Columns of `counts.csv`. `n_list` of the `n_top` genes are in the background. `expected` and its 95 % range:
significant pathways of random lists of like expression by the same test; `p`: share of them with as many. `n_matched`,
`n_empirical`: pathways significant by `matched_fdr`, `empirical_fdr`."""
CRITERIA = ("fdr", "matched_fdr", "empirical_fdr")


def choose_top(enrichment: pd.DataFrame, n: int) -> pd.DataFrame:
    """The first `n` pathways of each list with any of its genes, by FDR, p and ratio, with their `place` from 1."""
    some = enrichment[enrichment["overlap"] > 0].assign(_down=lambda t: -t["ratio"])
    keys = list(KEYS)
    some = some.sort_values(["fdr", "p", "_down", "pathway"], kind="stable")
    some = some.assign(place=some.groupby(keys, sort=False).cumcount() + 1)
    some = some[some["place"] <= n]
    order = {key: place for place, key in enumerate(map(tuple, enrichment[keys].drop_duplicates().to_numpy()))}
    block = np.array([order[tuple(row)] for row in some[keys].to_numpy()], dtype=int)
    some = some.assign(_block=block).sort_values(["_block", "place"], kind="stable", ignore_index=True)
    return some[["place", *ENRICHMENT]]


def tabulate_lost(library: Library, symbols: Sequence[str], repeated: pd.DataFrame) -> pd.DataFrame:
    """Genes that count nowhere: `side` ranking (in no set), library (not of the model), or repeated (symbol taken)."""
    model = set(symbols)
    sides = {
        "ranking": sorted(model.difference(library.symbols)),
        "library": sorted(set(library.symbols) - model),
        "repeated": sorted(set(repeated["gene"])),
    }
    rows = [(library.name, side, name) for side, names in sides.items() for name in names]
    return pd.DataFrame(rows, columns=["library", "side", "gene"])


def tabulate_libraries(library: Library, symbols: Sequence[str]) -> pd.DataFrame:
    """How much of a library is in the model, and how much of the model in the library."""
    shared = len(set(symbols).intersection(library.symbols))
    row = {
        "library": library.name,
        "n_sets": len(library.pathways),
        "n_genes": len(library.symbols),
        "n_model_genes": len(set(symbols)),
        "n_shared": shared,
        "share_of_library": shared / len(library.symbols),
        "share_of_model": shared / len(set(symbols)),
    }
    return pd.DataFrame([row])


def find_planted(wanted: Sequence[str], pathways: Sequence[str]) -> set[str]:
    """Names of planted pathways; what is no name is the beginning of names, with or without a `*` behind it.

    Raises
    ------
    ConfigError
        If one is neither.
    """
    found: set[str] = set()
    for name in wanted:
        hits = {name} if name in pathways else {p for p in pathways if p.startswith(name.removesuffix("*"))}
        if not hits:
            raise ConfigError(f"enrich: planted: {name!r} is in no library; {suggest(name, pathways[:50])}")
        found |= hits
    return found


def score_planted(enrichment: pd.DataFrame, planted: set[str], level: float) -> pd.DataFrame:
    """Sensitivity and specificity of significance, by list and by each of `CRITERIA`.

    Planted sets too small or large to be tested count as neither; `n_planted` less `n_planted_tested` are those.
    """
    rows = []
    for key, table in enrichment.groupby(list(KEYS), sort=False):
        truth = table["pathway"].isin(planted).to_numpy()
        for criterion in CRITERIA:
            if table[criterion].isna().all():
                continue
            found = (table[criterion] <= level).to_numpy()
            hits, false = int((found & truth).sum()), int((found & ~truth).sum())
            n_true, n_other = int(truth.sum()), int((~truth).sum())
            rows.append(
                (*key, criterion, len(planted), n_true, hits, n_other, false, hits / n_true if n_true else np.nan,
                 1 - false / n_other if n_other else np.nan)
            )  # fmt: skip
    columns = (
        "criterion",
        "n_planted",
        "n_planted_tested",
        "n_found",
        "n_other",
        "n_false",
        "sensitivity",
        "specificity",
    )
    return pd.DataFrame(rows, columns=[*KEYS, *columns])
