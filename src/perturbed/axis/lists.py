"""Rankings of genes: the gradients' and their rivals', on the same genes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbed.axis.baselines import compare_decoded_medians, compare_donors, correlate_with_axis, sum_counts
from perturbed.axis.cells import ARMS, AxisCells
from perturbed.axis.groups import Group
from perturbed.axis.spec import AxisCase
from perturbed.axis.validity import adjust_fdr, can_permute, describe_exchange, permutation_p, quantiles
from perturbed.gradients.agreement import cosine

NO_COUNTS = "absent: the cells came with latents and without counts"
FEW_DONORS = "absent: fewer than two donors of an arm have enough cells"
LISTS = (
    "gradient_unperturbed", "gradient_perturbed", "gradient_logits_unperturbed", "gradient_logits_perturbed",
    "slope_unperturbed", "slope_perturbed", "median_decoded", "pseudobulk", "axis_correlation", "random",
)  # fmt: skip


class ListNotes(NamedTuple):
    """What is to be said of lists."""

    absent: dict[str, str]
    """Why lists are absent, by name."""
    adjusted: str
    """Whether the donors' t was adjusted for studies; empty where there is none."""


def make_lists(cells: AxisCells, group: Group, spec: AxisCase) -> tuple[dict[str, np.ndarray], ListNotes]:
    """Scores of every list of a group (n_genes,) by name, and what is to be said of them.

    `gradient`: the paper's mean cosine. `gradient_logits`: the same before softmax. `slope`: mean gradient before
    softmax along the unit axis: change of log expression per unit of the latents, which sees how long a gradient is.
    `median_decoded`: the paper's baseline. `pseudobulk`: moderated t by donor. `axis_correlation`: of expression with
    the cells' place along the axis. `random`: numbers.
    """
    found = {f"gradient_{arm}": group.scores.cosine[k][:, 0] for k, arm in enumerate(ARMS)}
    found |= {f"gradient_logits_{arm}": group.logits.cosine[k][:, 0] for k, arm in enumerate(ARMS)}
    found |= {f"slope_{arm}": group.logits.projection[k] for k, arm in enumerate(ARMS)}
    found["median_decoded"] = compare_decoded_medians(cells, group.rows)
    found["random"] = np.random.default_rng([spec.seed, 5]).uniform(-1, 1, len(group.kept))
    if cells.counts is None:
        return found, ListNotes(dict.fromkeys(("pseudobulk", "axis_correlation"), NO_COUNTS), "")
    found["axis_correlation"] = correlate_with_axis(cells.counts, group.rows, cells.z[group.rows] @ group.axis)
    sums = sum_counts(cells.counts, group.rows, cells.donor[group.rows], len(cells.donors))
    compared = compare_donors(sums, group.arm, cells.donors["study"].to_numpy(dtype=object))
    if compared is None:
        return found, ListNotes({"pseudobulk": FEW_DONORS}, "")
    return found | {"pseudobulk": compared.t}, ListNotes({}, compared.adjusted)


def rank_genes(group: Group, lists: Mapping[str, np.ndarray], cells: AxisCells) -> pd.DataFrame:
    """One row per gene and list, best first: `rank` is 1 for the largest |score| among the kept genes."""
    tables = []
    for name in LISTS:
        if name not in lists:
            continue
        score = lists[name].astype(np.float64)
        kept = group.kept & np.isfinite(score)
        order = np.lexsort((-np.abs(np.nan_to_num(score)), ~kept))
        rank = np.full(len(score), np.nan)
        rank[order[: kept.sum()]] = np.arange(1, kept.sum() + 1)
        table = pd.DataFrame(
            {
                "list": name, "group": group.name, "gene": cells.decoder.genes, "symbol": cells.symbols,
                "score": score, "rank": pd.array(rank, dtype="Int64"), "kept": kept,
                "mean_expression": group.expression,
            }
        )  # fmt: skip
        tables.append(table.iloc[order])
    return pd.concat(tables, ignore_index=True)


def describe_lists(group: Group, notes: ListNotes) -> list[dict[str, Any]]:
    """Which lists there are, on how many genes, why others are absent, and whether they were adjusted for studies."""
    return [
        {
            "list": name, "group": group.name, "n_genes": len(group.kept), "n_kept": int(group.kept.sum()),
            "n_dropped": int((~group.kept).sum()), "adjusted": notes.adjusted if name == "pseudobulk" else "",
            "note": notes.absent.get(name, ""),
        }
        for name in LISTS
    ]  # fmt: skip


def gene_table(group: Group, cells: AxisCells, spec: AxisCase) -> pd.DataFrame:
    """Scores of all genes, one row per arm and gene, the highest cosine first."""
    tables = []
    for k, arm in enumerate(ARMS):
        cosines = group.scores.cosine[k]
        draws = cosines[:, group.draws.bootstrap]
        draws = draws[:, np.isfinite(draws).any(axis=0)]
        bounds = quantiles(draws, spec.confidence)
        p, p_cosine = permutation_p(group, k, spec)
        columns: dict[str, Any] = {
            "group": group.name, "cells": arm, "gene": cells.decoder.genes, "symbol": cells.symbols,
            "kept": group.kept, "cosine": cosines[:, 0], "low": bounds[:, 0], "high": bounds[:, 1],
            "same_sign": (np.sign(draws) == np.sign(cosines[:, :1])).mean(axis=1) if draws.shape[1] else np.nan,
            "cosine_logits": group.logits.cosine[k][:, 0], "projection": group.scores.projection[k],
            "norm": group.scores.norm[k], "norm_logits": group.logits.norm[k], "mean_expression": group.expression,
            "p": p, "fdr": adjust_fdr(p), "p_cosine": p_cosine, "n_cells": group.scores.n_cells[k],
            "n_donors": int((group.arm == k).sum()),
        }  # fmt: skip
        if "composition_equal" in group.draws.kinds:
            columns["cosine_composition_equal"] = cosines[:, group.column("composition_equal")]
        tables.append(pd.DataFrame(columns).sort_values("cosine", ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def describe_axes(group: Group, spec: AxisCase) -> dict[str, Any]:
    """Length of a group's axis, its cells and donors, and how it agrees with other ways to draw it."""
    row: dict[str, Any] = {
        "group": group.name, "axis": spec.axis, "length": float(np.linalg.norm(group.axis)),
        "n_genes_kept": int(group.kept.sum()), "n_genes_dropped": int((~group.kept).sum()),
    }  # fmt: skip
    for k, arm in enumerate(ARMS):
        row |= {f"cells_{arm}": group.n_cells[k], f"donors_{arm}": int((group.arm == k).sum())}
    for i, kind in enumerate(group.draws.kinds):
        if i:
            row[f"cosine_{kind}"] = float(cosine(group.axis, group.draws.axes[i]))
    together = cosine(*(group.draws.axes[half] for half in group.draws.halves))
    row["cosine_halves"] = float(np.nanmean(together)) if np.isfinite(together).any() else np.nan
    row["permutation"] = can_permute(group, spec) or describe_exchange(group)
    row["note"] = ""
    return row
