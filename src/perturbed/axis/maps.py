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
N_GRID = 16
"""Squares of a flow's arrows along the longer side."""
MIN_SQUARE = 4
"""Cells a square needs for an arrow."""


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
                "sign": flow.spec.sign, "arm": name, "cosine": float(values[0]), "low": low, "high": high,
                "axis_length": float(np.linalg.norm(flow.axis)), "n_cells": scores.n_cells[k],
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
        Per flow and `projection` (`pca`: principal components of its own cells; `axis`: place along the axis and the
        first principal component at right angles to it; `umap`): cells (`kind` cell: `x`, `y`, `arm`) and arrows
        (`kind` arrow: mean place of the cells of a square, mean step `u`, `v`, `n_cells`).
    """
    rows = _balanced(cells, np.arange(len(cells.kind)), MAX_MAP, spec.seed)
    z = cells.z[rows]
    basis, centre = _components(z)
    place = (z - centre) @ basis
    moved = [_balanced(cells, flow.rows, MAX_MOVED, spec.seed) for flow in flows]
    paths = [_paths(cells, flow, own, spec) for flow, own in zip(flows, moved)]
    empty = np.empty((0, z.shape[1]), dtype=np.float32)
    start = np.vstack([path[0] for path in paths]) if paths else z[:1]
    end = np.vstack([path[-1] for path in paths]) if paths else np.vstack([empty, z[:1]])
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
        part = slice(first, first + len(own))
        first += len(own)
        tables += _flat_tables(cells, flow, spec)
        tables.append(_umap_table(cells, flow, rows, embedded, own, ends[:, part]))
    columns = ["flow", "projection", "kind", "x", "y", "u", "v", "arm", "n_cells"]
    return table, pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _balanced(cells: AxisCells, rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many cells, as many of each arm, ascending."""
    return np.sort(np.concatenate([draw_rows(0, most // 2, seed, rows[cells.arm[rows] == k]) for k in (0, 1)]))


def _components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two principal components (n_latent, 2), their largest loadings positive, and the mean (n_latent,)."""
    centre = z.mean(axis=0, dtype=np.float64)
    basis = np.linalg.svd(z - centre, full_matrices=False)[2][:2].T
    return basis * np.sign(basis[np.abs(basis).argmax(axis=0), [0, 1]]), centre


def _axis_plane(z: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The axis and the first principal component at right angles to it (n_latent, 2), and the mean."""
    along = axis / np.linalg.norm(axis)
    rest = z - np.outer(z @ along, along)
    basis, _ = _components(rest)
    return np.column_stack([along, basis[:, 0]]), z.mean(axis=0, dtype=np.float64)


def _flat_tables(cells: AxisCells, flow: Flow, spec: AxisCase) -> list[pd.DataFrame]:
    rows = _balanced(cells, flow.rows, MAX_FLOW, spec.seed)
    z, steps = cells.z[rows], _velocity(cells, rows, flow)
    planes = {"pca": _components(z), "axis": _axis_plane(z, flow.axis)}
    tables = []
    for name, (basis, centre) in planes.items():
        place = (z - centre) @ basis
        dots = pd.DataFrame({"x": place[:, 0], "y": place[:, 1], "arm": np.array(ARMS)[cells.arm[rows]]})
        tables.append(_label(dots.assign(kind="cell"), flow, name))
        tables.append(_label(_mean_arrows(place, steps @ basis), flow, name))
    return tables


def _paths(cells: AxisCells, flow: Flow, rows: np.ndarray, spec: AxisCase) -> np.ndarray:
    context = cells.decoder.context(list(cells.batch[rows]))
    path = follow(cells.decoder, cells.z[rows], context, [flow.move], n_steps=spec.n_steps, delta=spec.delta, unit=True)
    return path.z


def _umap_table(
    cells: AxisCells, flow: Flow, rows: np.ndarray, embedded: np.ndarray, moved: np.ndarray, ends: np.ndarray
) -> pd.DataFrame:
    """Cells of the map that are the flow's, and mean arrows of those that were moved."""
    own = np.isin(rows, flow.rows)
    arm = np.array(ARMS)[cells.arm[rows[own]]]
    dots = pd.DataFrame({"x": embedded[own, 0], "y": embedded[own, 1], "arm": arm, "kind": "cell"})
    rest = pd.DataFrame({"x": embedded[~own, 0], "y": embedded[~own, 1], "arm": "other", "kind": "cell"})
    arrows = _mean_arrows(ends[0], ends[1] - ends[0], n_grid=2 * N_GRID)
    return _label(pd.concat([rest, dots, arrows], ignore_index=True), flow, "umap")


def _label(table: pd.DataFrame, flow: Flow, projection: str) -> pd.DataFrame:
    return table.assign(flow=flow.spec.label, projection=projection).reindex(
        columns=["flow", "projection", "kind", "x", "y", "u", "v", "arm", "n_cells"]
    )


def _mean_arrows(place: np.ndarray, steps: np.ndarray, n_grid: int = N_GRID) -> pd.DataFrame:
    """Mean place and step of the cells of each square of a grid that has enough of them."""
    side = np.ptp(place, axis=0).max() / n_grid
    square = np.floor((place - place.min(axis=0)) / max(side, 1e-12)).astype(int)
    table = pd.DataFrame(np.column_stack([place, steps]), columns=["x", "y", "u", "v"])
    grouped = table.groupby([square[:, 0], square[:, 1]])
    means = grouped.mean().assign(n_cells=grouped.size(), kind="arrow")
    return means[means["n_cells"] >= MIN_SQUARE].reset_index(drop=True)
