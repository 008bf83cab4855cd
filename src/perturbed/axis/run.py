"""An axis case from cells and model to a folder of tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.axis.axes import read_axis
from perturbed.axis.cells import ARMS, AxisCells, read_cells
from perturbed.axis.groups import Group, group_names, score_group
from perturbed.axis.lists import describe_axes, describe_lists, gene_table, make_lists, rank_genes
from perturbed.axis.maps import judge_flow, map_cells, prepare_flows
from perturbed.axis.spec import AxisCase
from perturbed.axis.validity import (
    describe_composition,
    describe_permutations,
    describe_softmax,
    describe_stability,
    recover_planted,
)
from perturbed.data.census.model import load_model
from perturbed.errors import DataError
from perturbed.files import atomic


def score_axis(
    spec: AxisCase,
    cells: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    truth: Path | None = None,
    symbols: Path | None = None,
    trust_sha256: str | None = None,
) -> None:
    """Answer a case and write its tables to the folder `out`, whole or not at all.

    Parameters
    ----------
    spec
        The case.
    cells
        `cells.h5ad`.
    model
        Folder with `model.pt`.
    out
        Folder to write: `arms.csv`, `rankings.csv`, `lists.csv`, `gene_scores.csv`, `axes.csv`, `stability.csv`,
        `permutation.csv`, `composition.csv`, `softmax.csv`, `cells.csv`, `flows.csv`, `flow_scores.csv` and, with
        `truth`, `planted.csv`.
    truth
        `truth.csv` of a simulation: `gene_id`, `effect`.
    symbols
        CSV with `gene_id` and `symbol`, for cells without counts.
    trust_sha256
        Hash of a `model.pt` that may be unpickled in full.

    Raises
    ------
    DataError
        If cells, model, columns, values, donors or genes are not what the case needs; one line.
    """
    decoder = load_model(model, trust_sha256)
    given = None if spec.given is None else read_axis(spec.given, decoder.n_latent)
    found = read_cells(spec, cells, decoder, symbols)
    effect = None if truth is None else _read_effects(truth, found)
    flows = prepare_flows(found, spec, given)  # before any long work
    names, left_out = group_names(found, spec)
    tables: dict[str, list[Any]] = {key: [] for key in _TABLES}
    tables["arms"] = _describe_arms(found, spec)
    for name in names:
        _add_group(tables, found, score_group(found, name, spec, given), spec, effect)
    tables["axes"] += [{"group": name, "note": f"left out: {why}"} for name, why in left_out.items()]
    for flow in flows:
        tables["flow_scores"] += judge_flow(found, flow, spec, given)
    tables["cells"], tables["flows"] = ([table] for table in map_cells(found, flows, spec))
    if effect is None:
        del tables["planted"]
    with atomic(out) as part:
        part.mkdir()
        for name, rows in tables.items():
            _write(rows, part / f"{name}.csv", _TABLES[name])


_TABLES: dict[str, tuple[str, ...]] = {
    "arms": (), "rankings": (), "lists": (), "gene_scores": (), "axes": (), "stability": (),
    "permutation": ("group", "cells", "statistic", "observed", "null_median", "null_high", "p", "n_genes_fdr",
                    "n_genes_family", "n_permutations", "n_possible", "exact", "studies_permuted", "exchanged", "note"),
    "composition": ("measure", "weighting", "cells", "type", "value", "n_types"),
    "softmax": (), "cells": (), "flows": (),
    "flow_scores": ("flow", "gene", "symbol", "cells", "sign", "on_map", "arm", "cosine", "low", "high", "axis_length",
                    "n_cells", "n_donors"),
    "planted": ("group", "list", "measure", "value", "low", "high", "chance", "unit", "n_planted", "n_genes"),
}  # fmt: skip
"""Tables, with their columns where rows may be missing or differ in what they hold."""


def _describe_arms(cells: AxisCells, spec: AxisCase) -> list[dict[str, Any]]:
    """The arms by the values that make them, with their cells and donors."""
    rows = []
    for k, (arm, group) in enumerate(zip(ARMS, (spec.unperturbed, spec.perturbed))):
        donors = cells.donors[cells.donors["arm"] == k]
        rows.append(
            {
                "arm": arm, "values": ", ".join(group.values), "n_cells": int((cells.arm == k).sum()),
                "n_cells_several_values": int(cells.joined[cells.arm == k].sum()),
                "n_donors": len(donors), "n_studies": donors["study"].nunique(),
            }
        )  # fmt: skip
    return rows


def _add_group(
    tables: dict[str, list[Any]], cells: AxisCells, group: Group, spec: AxisCase, effect: np.ndarray | None
) -> None:
    """Everything that is said of a group; its scores along thousands of axes are not kept."""
    genes = gene_table(group, cells, spec)
    tables["gene_scores"].append(genes)
    fdr = {str(arm): own["fdr"].to_numpy() for arm, own in genes.groupby("cells")}
    tables["axes"].append(describe_axes(group, spec))
    tables["stability"] += describe_stability(group, spec)
    tables["permutation"] += describe_permutations(group, spec, fdr)
    tables["softmax"] += describe_softmax(group, effect)
    if not tables["composition"]:  # the first group is all cells
        tables["composition"] += describe_composition(cells, group, spec)
    listed = group.name in spec.list_groups
    if not listed and effect is None:
        return
    lists, notes = make_lists(cells, group, spec)
    if listed:
        tables["rankings"].append(rank_genes(group, lists, cells))
        tables["lists"] += describe_lists(group, notes)
    if effect is not None:
        tables["planted"] += recover_planted(group, lists, effect, spec)


def _read_effects(path: Path, cells: AxisCells) -> np.ndarray:
    """Planted effects of the model's genes; genes that the truth does not name have none (n_genes,)."""
    try:
        table = pd.read_csv(path).set_index("gene_id")["effect"].astype(float)
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path}: no table with gene_id and effect ({error})"
        raise DataError(f"{problem}; give the truth.csv of `perturbed census simulate`") from None
    effect = table.reindex(list(cells.decoder.genes)).fillna(0.0).to_numpy()
    if not (effect != 0).any():
        raise DataError(f"{path}: none of its genes with an effect is a gene of the model; is it of these cells?")
    return effect


def _write(rows: list[Any], path: Path, columns: tuple[str, ...]) -> None:
    tables = rows and isinstance(rows[0], pd.DataFrame)
    table = pd.concat(rows, ignore_index=True) if tables else pd.DataFrame(rows)
    if columns:
        table = table.reindex(columns=list(columns))
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
