"""One group of cells: its axes, and the scores of all genes along them, their resamples and permutations."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from perturbed.axis.axes import (
    DonorSums,
    Permutations,
    Weights,
    balanced_axis,
    bootstrap_weights,
    half_weights,
    make_axes,
    observed_weights,
    permute_labels,
    sum_donors,
    unit,
)
from perturbed.axis.baselines import mean_decoded
from perturbed.axis.cells import AxisCells
from perturbed.axis.spec import POOLED, AxisCase
from perturbed.axis.unit_gradients import Scores, score_along, sum_gradients
from perturbed.errors import DataError
from perturbed.gradients.projection import draw_rows

KINDS = ("means", "donors", "discriminant")
N_HALVES = 50
"""Splits of the donors into halves."""


class Draws(NamedTuple):
    """Axes and weights of donors, one column per draw: kinds of axes, bootstrap, permutations, halves."""

    axes: np.ndarray
    """(n_draws, n_latent), of their own length."""
    weights: Weights
    kinds: tuple[str, ...]
    """Kinds of the first axes, the case's own first."""
    bootstrap: slice
    permuted: slice
    halves: tuple[slice, slice]
    permutations: Permutations


class Group(NamedTuple):
    """A group and its scores."""

    name: str
    rows: np.ndarray
    """Its cells by position."""
    arm: np.ndarray
    """Arm of each donor, −1 for those without cells here (n_donors,)."""
    n_cells: tuple[int, int]
    """Cells of both arms."""
    draws: Draws
    scores: Scores
    """Cosines of the gradients of the expected share, for every draw."""
    logits: Scores
    """Cosines of the gradients before softmax, for the kinds of axes."""
    expression: np.ndarray
    """Mean decoded share over the scored cells (n_genes,)."""
    kept: np.ndarray
    """Genes of the lists (n_genes,)."""

    @property
    def axis(self) -> np.ndarray:
        """The case's axis (n_latent,)."""
        return self.draws.axes[0]

    def column(self, kind: str) -> int:
        """Draw of a kind of axis."""
        return self.draws.kinds.index(kind)


def group_names(cells: AxisCells, spec: AxisCase) -> tuple[list[str], dict[str, str]]:
    """Groups to answer for, all cells first, and why others are left out.

    Raises
    ------
    DataError
        If all cells together, or a group that the case names, are too few.
    """
    kinds = [] if spec.groups is None else sorted(set(cells.kind))
    for name in (*spec.judged, *(set(spec.list_groups) - {POOLED})):
        if name not in kinds:
            raise DataError(
                f"{cells.path}: no cell of either arm has {spec.groups} {name!r}; it has {', '.join(kinds)}"
            )
    found, left_out = [], {}
    named = {POOLED, *spec.judged, *spec.list_groups}
    for name in (POOLED, *kinds):
        if spec.judged and name not in named:
            continue
        problem = cells.unfit(cells.group(name), spec)
        if problem and name in named:
            raise DataError(f"{cells.path}: {name}: {problem}; choose other arms or cells, or lower the limit")
        if problem:
            left_out[name] = problem
        else:
            found.append(name)
    return found, left_out


def comparable_kinds(cells: AxisCells, spec: AxisCase) -> list[str]:
    """Cell types with enough cells in both arms to hold composition equal."""
    return [
        name
        for name in sorted(set(cells.kind))
        if min(((cells.kind == name) & (cells.arm == k)).sum() for k in (0, 1)) >= spec.min_cells
    ]


def score_group(cells: AxisCells, name: str, spec: AxisCase, given: np.ndarray | None = None) -> Group:
    """Score all genes of a group along its axes.

    Parameters
    ----------
    cells
        The cells.
    name
        The group.
    spec
        The case.
    given
        The axis of `axis: given` (n_latent,).
    """
    rows = cells.group(name)
    arm = np.full(len(cells.donors), -1)
    present = np.unique(cells.donor[rows])
    arm[present] = cells.donors["arm"].to_numpy()[present]
    draws = _plan_draws(cells, rows, arm, spec, given, balance=name == POOLED)
    scored = np.sort(
        np.concatenate([draw_rows(len(rows), spec.n_cells, spec.seed, rows[cells.arm[rows] == k]) for k in (0, 1)])
    )
    context = cells.decoder.context(list(cells.batch[scored]))
    z, donor, n_genes = cells.z[scored], cells.donor[scored], len(cells.decoder.genes)
    if not np.isfinite(draws.axes[0]).all() or not draws.axes[0].any():
        raise DataError(f"{cells.path}: {name}: the axis has no direction; do both arms hold the same cells?")
    found = []
    for logits in (False, True):
        count = len(draws.kinds) if logits else len(draws.axes)
        weights = Weights(draws.weights.unperturbed[:, :count], draws.weights.perturbed[:, :count])
        sums = sum_gradients(cells.decoder, z, context, donor, draws.axes[0], logits=logits)
        found.append(score_along(sums, unit(draws.axes[:count]), weights, arm, n_genes))
    n = tuple(int((cells.arm[rows] == k).sum()) for k in (0, 1))
    kept = keep_genes(found[1], spec.min_norm) & np.isfinite(np.column_stack([c[:, 0] for c in found[0].cosine])).all(1)
    expression = mean_decoded(cells.decoder, z, context)
    return Group(name, rows, arm, (n[0], n[1]), draws, found[0], found[1], expression, kept)


def keep_genes(logits: Scores, min_norm: float) -> np.ndarray:
    r"""Genes whose gradient is long enough for its direction to mean something (n_genes,).

    A cosine does not see how long a gradient is. Kept are genes with

    .. math:: \overline{|\nabla l_g|} \ge c \cdot \mathrm{median}_h \, \overline{|\nabla l_h|},

    the mean over both arms of the length of the gradient before the link, c being `min_norm`. Before the link, because
    a share's gradient is in proportion to the share, so that its length is a rule on expression, and because softmax
    gives every gene the gradient of all others.
    """
    length = (logits.norm[0] + logits.norm[1]) / 2
    return (length > 0) & (length >= min_norm * np.median(length))


def _plan_draws(
    cells: AxisCells, rows: np.ndarray, arm: np.ndarray, spec: AxisCase, given: np.ndarray | None, *, balance: bool
) -> Draws:
    sums = sum_donors(cells.z[rows], cells.donor[rows], cells.arm[rows], len(arm), second=True)
    observed = observed_weights(arm)
    kinds = [spec.axis, *(kind for kind in KINDS if kind != spec.axis)]
    axes = [_axis(kind, sums, observed, given) for kind in kinds]
    types = comparable_kinds(cells, spec) if balance and spec.groups is not None else []
    if len(types) > 1:
        for weighting in ("equal", "pooled"):
            kinds.append(f"composition_{weighting}")
            axes.append(balanced_axis(cells.z, cells.arm, cells.kind, types, weighting)[None])
    study = cells.donors["study"].to_numpy(dtype=object)
    permutations = permute_labels(arm, study, spec.n_permutations, spec.seed)
    drawn = [bootstrap_weights(arm, spec.n_bootstrap, spec.seed), permutations.weights]
    drawn += half_weights(arm, N_HALVES, spec.seed)
    axes += [_axis(spec.axis, sums, weights, given) for weights in drawn]
    weights = [Weights(*(np.repeat(w, len(kinds), axis=1) for w in observed)), *drawn]
    edges = np.cumsum([w.perturbed.shape[1] for w in weights])
    parts = [slice(int(a), int(b)) for a, b in pairwise(edges)]
    joined = Weights(np.hstack([w.unperturbed for w in weights]), np.hstack([w.perturbed for w in weights]))
    return Draws(np.vstack(axes), joined, tuple(kinds), parts[0], parts[1], (parts[2], parts[3]), permutations)


def _axis(kind: str, sums: DonorSums, weights: Weights, given: np.ndarray | None) -> np.ndarray:
    if kind == "given":
        assert given is not None
        return np.repeat(given[None], weights.perturbed.shape[1], axis=0)
    return make_axes(kind, sums, weights)  # type: ignore[arg-type]
