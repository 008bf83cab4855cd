"""Cells in two dimensions, and the flows of genes among them: principal components, the plane of the axis, UMAP."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbed.axis.axes import (
    Weights,
    bootstrap_weights,
    make_axes,
    observed_weights,
    sum_donors,
    unit,
)
from perturbed.axis.cells import ARMS, AxisCells
from perturbed.axis.spec import POOLED, AxisCase, GeneFlow
from perturbed.axis.unit_gradients import DonorGradients, score_along
from perturbed.axis.validity import interval
from perturbed.errors import DataError, suggest
from perturbed.gradients.flow import Move, follow, velocity
from perturbed.gradients.projection import draw_rows, project_by_umap

MAX_MAP = 3000
"""Cells of the maps, of both arms together."""
MAX_FLOW = 1500
"""Cells that a flow is drawn from, of both arms together."""
MAX_MOVED = 300
"""Cells of a flow that are moved in the UMAP, of both arms together."""
N_GRID = 12
"""Fields of a flow's arrows along either side of its cells."""
SIGNS = (1, -1)
"""Raised and lowered."""
COLUMNS = ("flow", "projection", "kind", "x", "y", "sign", "u", "v", "arm", "n_cells")
"""Of `flows.csv`."""
MIN_CELLS = 4
"""Cells a field needs for an arrow."""


class Flow(NamedTuple):
    """One flow."""

    spec: GeneFlow
    move: Move
    symbol: str
    rows: np.ndarray
    """Its cells by position."""
    axis: np.ndarray
    """The axis of these cells (n_latent,)."""

    @property
    def cells(self) -> str:
        """Its cell types in words."""
        return " + ".join(self.spec.cells) or POOLED


def find_gene(cells: AxisCells, name: str) -> int:
    """Column of a gene by id or symbol.

    Raises
    ------
    DataError
        If the model does not have it, or a symbol stands for several.
    """
    by_id = {gene: i for i, gene in enumerate(cells.decoder.genes)}
    if name in by_id:
        return by_id[name]
    found = np.flatnonzero(cells.symbols == name)
    if len(found) == 1:
        return int(found[0])
    if len(found) > 1:
        ids = ", ".join(cells.decoder.genes[i] for i in found)
        raise DataError(f"flows: {name!r} is the symbol of {len(found)} genes of the model ({ids}); give one's id")
    raise DataError(f"flows: the model has no gene {name!r}; {suggest(name, _likely(cells, name))}")


def _likely(cells: AxisCells, name: str) -> list[str]:
    """Symbols that begin alike, or a few, so that a message does not list thousands."""
    alike = [str(x) for x in cells.symbols if str(x)[:2].lower() == name[:2].lower()]
    return alike[:200] or [str(x) for x in cells.symbols[:5]]


def prepare_flows(cells: AxisCells, spec: AxisCase, given: np.ndarray | None) -> list[Flow]:
    """The flows of a case: genes and cells found, axes of their cells made.

    Raises
    ------
    DataError
        If a gene or cell type does not exist, or the cells have no two arms.
    """
    flows = []
    kinds = set(cells.kind)
    for flow in spec.flows:
        gene = find_gene(cells, flow.gene)
        for name in flow.cells:
            if name not in kinds:
                raise DataError(f"flows: {flow.label}: no cell of either arm is {name!r}; {suggest(name, kinds)}")
        rows = np.flatnonzero(np.isin(cells.kind, flow.cells)) if flow.cells else np.arange(len(cells.kind))
        problem = cells.unfit(rows, spec)
        if problem:
            raise DataError(f"flows: {flow.label}: {problem}; choose other cells, or lower the limit")
        arm = _arms(cells, rows)
        axis = _make(spec, cells, rows, arm, observed_weights(arm), given)[0]
        move = Move((cells.decoder.genes[gene],), flow.sign)
        flows.append(Flow(flow, move, str(cells.symbols[gene]), rows, axis))
    return flows


def _arms(cells: AxisCells, rows: np.ndarray) -> np.ndarray:
    arm = np.full(len(cells.donors), -1)
    present = np.unique(cells.donor[rows])
    arm[present] = cells.donors["arm"].to_numpy()[present]
    return arm


def _make(
    spec: AxisCase, cells: AxisCells, rows: np.ndarray, arm: np.ndarray, weights: Weights, given: np.ndarray | None
) -> np.ndarray:
    if given is not None:
        return np.repeat(given[None], weights.perturbed.shape[1], axis=0)
    second = spec.axis == "discriminant"
    sums = sum_donors(cells.z[rows], cells.donor[rows], cells.arm[rows], len(arm), second=second)
    return make_axes(spec.axis, sums, weights)


def judge_flow(cells: AxisCells, flow: Flow, spec: AxisCase, given: np.ndarray | None) -> list[dict[str, Any]]:
    """Mean cosine of a flow's steps with the axis of its cells, per arm, with its interval over donors."""
    arm = _arms(cells, flow.rows)
    parts = (observed_weights(arm), bootstrap_weights(arm, spec.n_bootstrap, spec.seed))
    weights = Weights(*(np.hstack([w[k] for w in parts]) for k in (0, 1)))
    axes = _make(spec, cells, flow.rows, arm, weights, given)
    scored = np.concatenate(
        [draw_rows(0, spec.n_cells, spec.seed, flow.rows[cells.arm[flow.rows] == k]) for k in (0, 1)]
    )
    steps = _velocity(cells, scored, flow)
    donor = cells.donor[scored]
    parts_of = (_donor_sum(int(d), steps[donor == d]) for d in np.unique(donor))
    scores = score_along(parts_of, unit(axes), weights, arm, 1)
    rows = []
    for k, name in enumerate(ARMS):
        values = scores.cosine[k][0]
        low, high = interval(values[1:], spec.confidence)
        rows.append(
            {
                "flow": flow.spec.label, "gene": flow.move.targets[0], "symbol": flow.symbol, "cells": flow.cells,
                "sign": flow.spec.sign, "on_map": flow.spec.on_map, "arm": name, "cosine": float(values[0]),
                "low": low, "high": high, "axis_length": float(np.linalg.norm(flow.axis)), "n_cells": scores.n_cells[k],
                "n_donors": int((arm == k).sum()),
            }
        )  # fmt: skip
    return rows


def _velocity(cells: AxisCells, rows: np.ndarray, flow: Flow) -> np.ndarray:
    """Steps of length 1 (n_cells, n_latent): a share's gradient is as small as the share, so its length says little."""
    context = cells.decoder.context(list(cells.batch[rows]))
    return velocity(cells.decoder, cells.z[rows], context, [flow.move], unit=True).numpy()


def _donor_sum(donor: int, steps: np.ndarray) -> DonorGradients:
    defined = np.array([float((np.abs(steps).max(axis=1) > 0).sum())])
    nothing = np.zeros(1)
    return DonorGradients(donor, steps.sum(axis=0, keepdims=True), defined, nothing, nothing, len(steps))


# --- projections --------------------------------------------------------------------------------------------------


def map_cells(cells: AxisCells, flows: list[Flow], spec: AxisCase) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of cells and of flows, in all projections.

    Returns
    -------
    cells
        `cell`, `arm`, `type`, `donor`, `pc1`, `pc2`, `umap1`, `umap2` of at most 3,000 cells, as many of each arm.
    flows
        Per flow and `projection` (`pca`: principal components of all cells of both arms, the same for all flows;
        `axis`: place along the axis and the first principal component of its own cells at right angles to it; `umap`):
        cells (`kind` cell: `x`, `y`, `arm`) and arrows (`kind` arrow: mean place of the cells of a field, mean step
        `u`, `v`, `n_cells`) for both directions (`sign` 1: raised, -1: lowered).
    """
    rows = _balanced(cells, np.arange(len(cells.kind)), MAX_MAP, spec.seed)
    z = cells.z[rows]
    basis, centre = _components(cells.z)
    place = (z - centre) @ basis
    moved = [_balanced(cells, flow.rows, MAX_MOVED, spec.seed) for flow in flows]
    paths = [_paths(cells, flow, own, sign, spec) for flow, own in zip(flows, moved) for sign in SIGNS]
    start = np.vstack([path[0] for path in paths]) if paths else z[:1]
    end = np.vstack([path[-1] for path in paths]) if paths else z[:1]
    embedded, ends = project_by_umap(z, start, end, spec.seed)
    table = pd.DataFrame(
        {
            "cell": cells.names[rows], "arm": np.array(ARMS)[cells.arm[rows]], "type": cells.kind[rows],
            "donor": cells.donors["donor"].to_numpy()[cells.donor[rows]], "pc1": place[:, 0], "pc2": place[:, 1],
            "umap1": embedded[:, 0], "umap2": embedded[:, 1],
        }
    )  # fmt: skip
    tables, first = [], 0
    for flow, own in zip(flows, moved):
        tables += _flat_tables(cells, flow, rows, place, (basis, centre), spec)
        tables.append(_label(_dots(cells, flow, rows, embedded), flow, "umap"))
        for sign in SIGNS:
            begun, ended = ends[:, first : first + len(own)]
            first += len(own)
            arrows = _mean_arrows(begun, ended - begun)
            tables.append(_label(arrows.assign(sign=sign), flow, "umap"))
    return table, pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COLUMNS))


def _balanced(cells: AxisCells, rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many cells, as many of each arm, ascending."""
    return np.sort(np.concatenate([draw_rows(0, most // 2, seed, rows[cells.arm[rows] == k]) for k in (0, 1)]))


def _components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two principal components (n_latent, 2), their largest loadings positive, and the mean (n_latent,)."""
    centre = z.mean(axis=0, dtype=np.float64)
    basis = np.linalg.eigh(np.cov(z, rowvar=False))[1][:, :-3:-1]  # ascending; latents are few, cells many
    return basis * np.sign(basis[np.abs(basis).argmax(axis=0), [0, 1]]), centre


def _axis_plane(z: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The axis and the first principal component at right angles to it (n_latent, 2), and the mean."""
    along = axis / np.linalg.norm(axis)
    rest = z - np.outer(z @ along, along)
    basis, _ = _components(rest)
    return np.column_stack([along, basis[:, 0]]), z.mean(axis=0, dtype=np.float64)


def _flat_tables(
    cells: AxisCells,
    flow: Flow,
    mapped: np.ndarray,
    place: np.ndarray,
    components: tuple[np.ndarray, np.ndarray],
    spec: AxisCase,
) -> list[pd.DataFrame]:
    """Cells and arrows in the two planes; `place` is that of the `mapped` cells on the components of all cells."""
    rows = _balanced(cells, flow.rows, MAX_FLOW, spec.seed)
    z, steps = cells.z[rows], _velocity(cells, rows, flow) * flow.spec.sign  # of the gene raised
    plane = _axis_plane(z, flow.axis)
    own = _dots(cells, flow, rows, (z - plane[1]) @ plane[0])
    tables = [_label(_dots(cells, flow, mapped, place), flow, "pca"), _label(own, flow, "axis")]
    for name, (basis, centre) in (("pca", components), ("axis", plane)):
        arrows = _mean_arrows((z - centre) @ basis, steps @ basis)
        for sign in SIGNS:
            turned = arrows.assign(u=sign * arrows["u"], v=sign * arrows["v"], sign=sign)
            tables.append(_label(turned, flow, name))
    return tables


def _paths(cells: AxisCells, flow: Flow, rows: np.ndarray, sign: int, spec: AxisCase) -> np.ndarray:
    context = cells.decoder.context(list(cells.batch[rows]))
    moves = [Move(flow.move.targets, sign)]
    return follow(cells.decoder, cells.z[rows], context, moves, n_steps=spec.n_steps, delta=spec.delta, unit=True).z


def _dots(cells: AxisCells, flow: Flow, rows: np.ndarray, place: np.ndarray) -> pd.DataFrame:
    """Cells by arm, those that are not the flow's as `other`, which come first."""
    arm = np.where(np.isin(rows, flow.rows), np.array(ARMS)[cells.arm[rows]], "other")
    table = pd.DataFrame({"x": place[:, 0], "y": place[:, 1], "arm": arm, "kind": "cell"})
    return table.sort_values("arm", key=lambda arms: arms != "other", kind="stable")


def _label(table: pd.DataFrame, flow: Flow, projection: str) -> pd.DataFrame:
    return table.assign(flow=flow.spec.label, projection=projection).reindex(columns=list(COLUMNS))


def _mean_arrows(place: np.ndarray, steps: np.ndarray) -> pd.DataFrame:
    """Mean place and step of the cells of each field of a grid that has enough of them."""
    side = np.maximum(np.ptp(place, axis=0) / N_GRID, 1e-12)  # of either side its own: panels stretch them anyhow
    field = np.floor((place - place.min(axis=0)) / side).astype(int)
    table = pd.DataFrame(np.column_stack([place, steps]), columns=["x", "y", "u", "v"])
    grouped = table.groupby([field[:, 0], field[:, 1]])
    means = grouped.mean().assign(n_cells=grouped.size(), kind="arrow")
    return means[means["n_cells"] >= MIN_CELLS].reset_index(drop=True)
