"""One gradient case from a fitted decoder to tables: agreement, ranks, arrivals, heads, quality, field and paths."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from perturbed.decoders.base import Decoder
from perturbed.errors import DataError, suggest
from perturbed.files import atomic
from perturbed.gradients.agreement import arrivals, compare_with_shift, cosine, match_genes, mean_gradients
from perturbed.gradients.cells import LatentCells, column_of, decoder_of, encode_cells, select
from perturbed.gradients.expression import correlate_genes, reconstruction_errors
from perturbed.gradients.flow import Manifold, Move, follow, map_flow, velocity
from perturbed.gradients.projection import (
    MAX_CELLS,
    MAX_MOVED,
    MAX_UMAP,
    draw_rows,
    project_by_umap,
    project_linearly,
)
from perturbed.gradients.quality import best_kmeans_ari, head_scores, local_gradient
from perturbed.gradients.spec import GradientCase
from perturbed.models.base import Method, load_model
from perturbed.models.nb_vae import NBVAE

UNTRAINED = 1_000_003
"""Added to the seed of the untrained decoder, so that no fit ever started from its weights."""
MAX_PATHS = 1000
"""Cells whose trajectories are followed."""


class Case(NamedTuple):
    """Everything a case works on."""

    spec: GradientCase
    decoder: Decoder
    cells: LatentCells
    moves: list[Move]
    velocity: np.ndarray
    """Velocity of every cell (n_cells, n_latent)."""
    start: np.ndarray
    """True for unperturbed cells (n_cells,)."""
    goal: np.ndarray | None
    """True for perturbed cells."""
    seed: int


def run_case(
    spec: GradientCase,
    model: Path,
    prepared: Path,
    split: Path,
    features: Path,
    out: Path,
    *,
    seed: int = 0,
    judged_group: str | None = None,
) -> None:
    """Answer a case and write its tables to the folder `out`.

    Parameters
    ----------
    spec
        The case.
    model, prepared, split, features
        The fitted decoder and the cells.
    out
        Folder to write: `agreement.csv`, `genes.csv`, `arrivals.csv`, `heads.csv`, `quality.csv`, `cells.csv` (at most
        5,000 of them), `paths.csv`, in two dimensions `field.csv`, and with `umap` `umap.csv` and `umap_arrows.csv`.
    seed
        Of the bootstrap, the nulls and the choice of cells drawn.
    judged_group
        Judge this group only, because its labels were masked for this very model.

    Raises
    ------
    DataError
        If cells, genes or columns that the case names do not exist.
    """
    method = load_model(model)
    case = _prepare(spec, method, prepared, split, features, seed)
    groups = list(_judged_groups(case, judged_group))
    axes = {name: _axis(case, inside) for name, inside in groups}
    starts = {name: np.flatnonzero(inside & case.start) for name, inside in groups}
    projections = {name: (rows, case.cells.z[rows] @ axes[name]) for name, rows in starts.items()}
    correlation = correlate_genes(prepared, case.decoder.genes, projections)
    genes = [_gene_table(case, name, starts[name], axes[name], correlation[name]) for name, _ in groups]
    tables = {
        "agreement": pd.DataFrame(_agreement_rows(case, groups, method)),
        "genes": pd.concat(genes, ignore_index=True),
        "arrivals": pd.DataFrame([_arrival_row(case, *group) for group in groups if case.goal is not None]),
        "heads": pd.DataFrame(_head_rows(case, method, judged_group)),
        "quality": pd.DataFrame(_quality_rows(case, method, prepared)),
        "cells": _cell_table(case),
        "paths": _path_table(case, None if judged_group is None else groups[0][1]),
    }
    if spec.umap:
        tables["umap"], tables["umap_arrows"] = _umap_tables(case)
    if case.decoder.n_latent == 2:
        tables["field"] = _field_table(case)
    with atomic(out) as part:
        part.mkdir()
        for name, table in tables.items():
            table.to_csv(part / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")


def _prepare(spec: GradientCase, method: Method, prepared: Path, split: Path, features: Path, seed: int) -> Case:
    decoder = decoder_of(method)
    decoder.find(spec.genes)  # before any work
    cells = encode_cells(decoder, prepared, split, features)
    moves = [Move(tuple(move.targets), move.sign) for move in spec.moves]
    arrows = velocity(decoder, cells.encoded.mean, cells.encoded.context, moves, unit=spec.unit).numpy()
    start = select(cells.obs, spec.unperturbed)
    goal = None if spec.perturbed is None else select(cells.obs, spec.perturbed)
    return Case(spec, decoder, cells, moves, arrows, start, goal, seed)


def _groups(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """Groups with enough cells in both arms, all cells first."""
    n_cells = len(case.start)
    yield "all", np.ones(n_cells, dtype=bool)
    if case.spec.groups is None:
        return
    column = column_of(case.cells.obs, case.spec.groups)
    for name in sorted(set(column)):
        inside = column == name
        arms = [case.start, *([] if case.goal is None else [case.goal])]
        if all(int((inside & arm).sum()) >= case.spec.min_cells for arm in arms):
            yield name, inside


def _judged_groups(case: Case, only: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """The groups that the case asks for, or the one whose labels were masked.

    Raises
    ------
    DataError
        If a group that is named does not exist or has too few cells.
    """
    found = dict(_groups(case))
    wanted = [only] if only is not None else ["all", *case.spec.judged] if case.spec.judged else list(found)
    for name in wanted:
        if name not in found:
            known = set(column_of(case.cells.obs, str(case.spec.groups))) if case.spec.groups else {"all"}
            if name in known:
                raise DataError(f"group {name!r} has fewer than {case.spec.min_cells} cells in an arm; lower min_cells")
            raise DataError(f"no cell has {case.spec.groups} {name!r}; {suggest(name, known)}")
        yield name, found[name]


def _axis(case: Case, inside: np.ndarray) -> np.ndarray:
    """What genes are compared with: the observed shift, or where there is none the case's own mean velocity."""
    if case.goal is not None:
        return _shift(case, inside)
    return np.asarray(case.velocity[inside & case.start].mean(axis=0))


def _shift(case: Case, inside: np.ndarray) -> np.ndarray:
    assert case.goal is not None
    z = case.cells.z
    return np.asarray(z[inside & case.goal].mean(axis=0) - z[inside & case.start].mean(axis=0))


# --- agreement ----------------------------------------------------------------------------------------------------


def _agreement_rows(case: Case, groups: list[tuple[str, np.ndarray]], method: Method) -> Iterator[dict[str, Any]]:
    """Flow, its rivals and its nulls against the observed shift, or against the local gradient of time."""
    untrained = _untrained_velocity(case, method) if case.spec.untrained else None
    for name, inside in groups:
        if case.goal is not None:
            yield {"group": name, "flow": "gradient", **_compare(case, inside, case.velocity)}
            if untrained is not None:
                yield {"group": name, "flow": "untrained decoder", **_compare(case, inside, untrained)}
            if name != "all":
                others = np.broadcast_to(_shift(case, ~inside), case.velocity.shape)
                yield {"group": name, "flow": "difference of means, other groups", **_compare(case, inside, others)}
        if case.spec.time is not None:
            yield {"group": name, "flow": "gradient, against time", **_compare_with_time(case, inside)}


def _compare(case: Case, inside: np.ndarray, flow: np.ndarray) -> dict[str, Any]:
    assert case.goal is not None
    spec = case.spec
    rows = inside & (case.start | case.goal)
    replicates = None if spec.replicates is None else column_of(case.cells.obs, spec.replicates)[rows]
    found = compare_with_shift(
        flow[rows], case.cells.z[rows], case.goal[rows], replicates=replicates, n_bootstrap=spec.n_bootstrap,
        n_permutations=spec.n_permutations, seed=case.seed,
    )  # fmt: skip
    return {"unit": spec.replicates or "cell", **found._asdict()}


def _compare_with_time(case: Case, inside: np.ndarray) -> dict[str, Any]:
    """Mean cosine of the velocity with the local gradient of time, bootstrapped over cells; null: times permuted."""
    assert case.spec.time is not None
    time = pd.to_numeric(case.cells.obs[case.spec.time], errors="coerce").to_numpy(dtype=float)
    rows = np.flatnonzero(inside & case.start & np.isfinite(time))
    z, rng = case.cells.z[rows].astype(float), np.random.default_rng(case.seed)
    each = cosine(case.velocity[rows], local_gradient(z, time[rows]))
    each = each[np.isfinite(each)]
    draws = [each[rng.integers(len(each), size=len(each))].mean() for _ in range(case.spec.n_bootstrap)]
    n_null = min(case.spec.n_permutations, 99)  # each costs a neighbour search
    null = np.array(
        [np.nanmean(cosine(case.velocity[rows], local_gradient(z, rng.permutation(time[rows])))) for _ in range(n_null)]
    )
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "unit": "cell", "cosine": each.mean(), "low": low, "high": high,
        "p": (1 + (null >= each.mean()).sum()) / (1 + len(null)), "null_mean": null.mean(),
        "null_high": np.quantile(null, 0.95), "n_unperturbed": len(rows), "n_perturbed": 0, "n_units": len(rows),
    }  # fmt: skip


def _untrained_velocity(case: Case, method: Method) -> np.ndarray:
    """Velocity of the same network with fresh weights, at the trained one's latents."""
    decoder = fresh_decoder(method, case.seed)
    place = case.cells.encoded.mean, case.cells.encoded.context
    return np.asarray(velocity(decoder, *place, case.moves, unit=case.spec.unit))


def fresh_decoder(method: Method, seed: int) -> Decoder:
    """The decoder of the same network with fresh weights."""
    fresh = deepcopy(method)
    module: Any = fresh.module  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED + seed)  # with the fit's own seed it would be what training started from
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    found: Decoder = decoder_of(fresh)
    return found


# --- genes --------------------------------------------------------------------------------------------------------


def _gene_table(case: Case, name: str, rows: np.ndarray, axis: np.ndarray, correlation: np.ndarray) -> pd.DataFrame:
    """Every gene's mean gradient against the axis, and where the targets rank among genes like them."""
    index = torch.from_numpy(rows)
    context = {key: value[index] for key, value in case.cells.encoded.context.items()}
    mean = mean_gradients(case.decoder, case.cells.encoded.mean[index], context, np.zeros(len(rows), dtype=int), 1)[0]
    table = pd.DataFrame({"group": name, "gene": case.decoder.genes, "cosine": cosine(mean, axis)})
    table["correlation"] = correlation
    table["norm"] = np.linalg.norm(mean, axis=1)
    table["projection"] = mean @ axis / max(float(np.linalg.norm(axis)), 1e-12)
    table["is_target"] = table["gene"].isin([t for move in case.moves for t in move.targets])
    table["percentile_among_alike"] = np.nan
    wanted = table["is_target"] | table["gene"].isin(case.spec.genes)
    targets = np.flatnonzero(wanted.to_numpy())
    if len(targets) and case.spec.n_random_genes:
        alike = match_genes(case.cells.mean, case.cells.variance, targets, case.spec.n_random_genes, seed=case.seed)
        score = table["cosine"].to_numpy()
        table.loc[targets, "percentile_among_alike"] = [
            (score[row] < score[target]).mean() for target, row in zip(targets, alike)
        ]
    return table


# --- trajectories -------------------------------------------------------------------------------------------------


def _followed(case: Case, inside: np.ndarray) -> tuple[np.ndarray, Any]:
    rows = np.flatnonzero(inside & case.start)
    rows = np.sort(np.random.default_rng(case.seed).permutation(rows)[:MAX_PATHS])
    index = torch.from_numpy(rows)
    context = {key: value[index] for key, value in case.cells.encoded.context.items()}
    manifold = Manifold(case.cells.z) if case.spec.manifold else None
    path = follow(
        case.decoder, case.cells.encoded.mean[index], context, case.moves, n_steps=case.spec.n_steps,
        delta=case.spec.delta, unit=case.spec.unit, manifold=manifold, record=case.spec.genes,
    )  # fmt: skip
    return rows, path


def _arrival_row(case: Case, name: str, inside: np.ndarray) -> dict[str, Any]:
    """Share of simulated cells nearer the perturbed mean, before and after, with Wilson's interval."""
    from statsmodels.stats.proportion import proportion_confint

    assert case.goal is not None
    _, path = _followed(case, inside)
    z = case.cells.z
    means = z[inside & case.start].mean(axis=0), z[inside & case.goal].mean(axis=0)
    before, after = arrivals(path.z[0], *means), arrivals(path.z[-1], *means)
    low, high = proportion_confint(int(after.sum()), len(after), method="wilson")
    return {
        "group": name, "n_cells": len(after), "share_before": before.mean(), "share_after": after.mean(),
        "low": low, "high": high, "n_steps": case.spec.n_steps, "delta": case.spec.delta,
        "stopped": path.stopped.mean(),
    }  # fmt: skip


def _path_table(case: Case, inside: np.ndarray | None) -> pd.DataFrame:
    """Mean decoded expression of the recorded genes along the way, from all unperturbed cells or a group's."""
    _, path = _followed(case, np.ones(len(case.start), dtype=bool) if inside is None else inside)
    rows = [
        {"step": step, "gene": gene, "mean": path.outputs[step, :, k].mean(), "sd": path.outputs[step, :, k].std()}
        for step in range(len(path.outputs))
        for k, gene in enumerate(path.names)
    ]
    return pd.DataFrame(rows, columns=["step", "gene", "mean", "sd"])


def _field_table(case: Case) -> pd.DataFrame:
    field = map_flow(case.decoder, case.cells.z, case.cells.encoded.context, case.moves)
    x, y = np.meshgrid(field.x, field.y)
    columns = {"x": x, "y": y, "u": field.u, "v": field.v, "inside": field.inside}
    return pd.DataFrame({key: value.ravel() for key, value in columns.items()})


def _cell_table(case: Case) -> pd.DataFrame:
    """Cells to draw: latents projected to two dimensions (themselves, or principal components), with their arrows."""
    place, arrow = project_linearly(case.cells.z.astype(float), case.velocity)
    table = pd.DataFrame({"x": place[:, 0], "y": place[:, 1], "u": arrow[:, 0], "v": arrow[:, 1]})
    table = pd.concat([table, _about_cells(case)], axis=1)
    return table.iloc[draw_rows(len(table), MAX_CELLS, case.seed)]


def _about_cells(case: Case) -> pd.DataFrame:
    arm = np.where(case.start, "unperturbed", "other")
    if case.goal is not None:
        arm = np.where(case.goal, "perturbed", arm)
    table = pd.DataFrame({"arm": arm, "part": case.cells.obs["part"].to_numpy()})
    table["group"] = "all" if case.spec.groups is None else column_of(case.cells.obs, case.spec.groups)
    if case.spec.time is not None:
        table["time"] = pd.to_numeric(case.cells.obs[case.spec.time], errors="coerce").to_numpy()
    return table


def _umap_tables(case: Case) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells in a UMAP, and arrows from some unperturbed ones to where the flow takes them."""
    rows = draw_rows(len(case.start), MAX_UMAP, case.seed)
    followed, path = _followed(case, np.ones(len(case.start), dtype=bool))
    moved = draw_rows(len(followed), MAX_MOVED, case.seed)
    place, ends = project_by_umap(case.cells.z[rows], path.z[0][moved], path.z[-1][moved], case.seed)
    cells = pd.DataFrame({"x": place[:, 0], "y": place[:, 1]})
    cells = pd.concat([cells, _about_cells(case).iloc[rows].reset_index(drop=True)], axis=1)
    step = ends[1] - ends[0]
    return cells, pd.DataFrame({"x": ends[0][:, 0], "y": ends[0][:, 1], "u": step[:, 0], "v": step[:, 1]})


# --- quality ------------------------------------------------------------------------------------------------------


def _head_rows(case: Case, method: Method, masked: str | None) -> Iterator[dict[str, Any]]:
    """Heads on the cells of each part, whatever labels were hidden in training, and on the masked group's."""
    heads = getattr(method.params, "heads", {})
    with torch.no_grad():
        decoded = case.decoder.decode(case.cells.encoded.mean, case.cells.encoded.context).heads.numpy()
    parts = {part: (case.cells.obs["part"] == part).to_numpy() for part in ("train", "val", "test")}
    if masked is not None:
        parts["masked group"] = column_of(case.cells.obs, str(case.spec.groups)) == masked
    for k, (name, head) in enumerate(heads.items()):
        column = column_of(case.cells.obs, head.column)
        known = ~np.isin(column, [*head.unknown, "nan", ""])
        for part, inside in parts.items():
            rows = known & inside
            if rows.sum() < 2:
                continue
            values = column[rows]
            label = np.isin(values, head.positive) if head.kind == "binary" else values.astype(float)
            for metric, value in head_scores(head.kind, decoded[rows, k], label).items():
                yield {"head": name, "part": part, "metric": metric, "value": value, "n_cells": int(rows.sum())}


def _quality_rows(case: Case, method: Method, prepared: Path) -> Iterator[dict[str, Any]]:
    if isinstance(method, NBVAE):
        yield from reconstruction_errors(method, prepared, case.cells)
    if case.spec.groups is not None:
        labels = column_of(case.cells.obs, case.spec.groups)
        rows = draw_rows(len(labels), MAX_CELLS, case.seed)
        ari, k = best_kmeans_ari(case.cells.z[rows], labels[rows], seed=case.seed)
        note = f"k = {k}, chosen by the labels"
        yield {"part": "all", "metric": "ari_best_kmeans", "value": ari, "n_cells": len(rows), "note": note}
