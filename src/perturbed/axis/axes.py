r"""Axes between two arms from sums over donors, so that any weighting of donors is a matrix product.

With weights :math:`w_d` of the unperturbed and :math:`v_d` of the perturbed donors (1 observed, counts of a bootstrap
draw, 0 or 1 of a permutation or half), :math:`n_d` cells and mean latent :math:`m_d`:

- `means`: :math:`a = \sum v_d n_d m_d / \sum v_d n_d - \sum w_d n_d m_d / \sum w_d n_d`, the difference of the cells'
  means (Bjerregaard et al. 2025);
- `donors`: :math:`a = \sum v_d m_d / \sum v_d - \sum w_d m_d / \sum w_d`;
- `discriminant`: :math:`\Sigma^{-1}` of the first, with the pooled covariance of cells within arms, shrunk.
"""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from typing import NamedTuple

import numpy as np

from perturbed.axis.spec import AxisKind
from perturbed.errors import DataError


class DonorSums(NamedTuple):
    """Sums over the cells of each donor."""

    n: np.ndarray
    """Cells (n_donors,)."""
    total: np.ndarray
    """Sum of latents (n_donors, n_latent)."""
    second: np.ndarray | None
    """Sum of outer products (n_donors, n_latent, n_latent); for the discriminant only."""
    shrinkage: float
    """Share of the covariance that is replaced by its mean variance times identity; Ledoit and Wolf's."""


class Weights(NamedTuple):
    """Weights of donors in either arm, one column per draw."""

    unperturbed: np.ndarray
    """(n_donors, n_draws)."""
    perturbed: np.ndarray
    """(n_donors, n_draws)."""


def sum_donors(z: np.ndarray, donor: np.ndarray, arm: np.ndarray, n_donors: int, *, second: bool = False) -> DonorSums:
    """Sums over the cells of each donor.

    Parameters
    ----------
    z
        Latents (n_cells, n_latent).
    donor, arm
        Of each cell (n_cells,).
    n_donors
        Number of donors; those without cells here have zeros.
    second
        Sum outer products, too.
    """
    n = np.bincount(donor, minlength=n_donors).astype(np.float64)
    total = np.zeros((n_donors, z.shape[1]))
    squares = np.zeros((n_donors, z.shape[1], z.shape[1])) if second else None
    for d in np.unique(donor):
        own = z[donor == d].astype(np.float64)
        total[d] = own.sum(axis=0)
        if squares is not None:
            squares[d] = own.T @ own
    shrinkage = 0.0
    if second:
        from sklearn.covariance import ledoit_wolf_shrinkage

        centred = z.astype(np.float64)
        for k in (0, 1):
            centred[arm == k] -= centred[arm == k].mean(axis=0)
        shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    return DonorSums(n, total, squares, shrinkage)


def make_axes(kind: AxisKind, sums: DonorSums, weights: Weights) -> np.ndarray:
    """The axis of every draw (n_draws, n_latent); NaN where an arm of a draw has no cells.

    Parameters
    ----------
    kind
        Not `given`.
    sums
        Sums over cells, by donor.
    weights
        Weights of the donors.
    """
    means = []
    for weight in weights:
        if kind == "donors":
            some = (sums.n > 0)[:, None] * weight
            per_donor = sums.total / np.maximum(sums.n, 1)[:, None]
            means.append(_divide(some.T @ per_donor, some.sum(axis=0)))
        else:
            means.append(_divide(weight.T @ sums.total, weight.T @ sums.n))
    axes = means[1] - means[0]
    return _discriminate(axes, means, sums, weights) if kind == "discriminant" else axes


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count[:, None], out=np.full_like(total, np.nan), where=count[:, None] > 0)


def _discriminate(axes: np.ndarray, means: list[np.ndarray], sums: DonorSums, weights: Weights) -> np.ndarray:
    assert sums.second is not None
    n_latent = axes.shape[1]
    found = np.full_like(axes, np.nan)
    identity = np.eye(n_latent)
    for i in range(len(axes)):  # draw by draw: all covariances at once would be large
        if not np.isfinite(axes[i]).all():
            continue
        within, n = np.zeros((n_latent, n_latent)), 0.0
        for mean, weight in zip(means, weights):
            cells = float(weight[:, i] @ sums.n)
            within += np.tensordot(weight[:, i], sums.second, axes=1) - cells * np.outer(mean[i], mean[i])
            n += cells
        within /= n
        target = sums.shrinkage * np.trace(within) / n_latent * identity
        found[i] = np.linalg.solve((1 - sums.shrinkage) * within + target, axes[i])
    return found


def unit(axes: np.ndarray) -> np.ndarray:
    """Axes of length 1 along the last dimension; NaN where there is no direction."""
    length = np.linalg.norm(axes, axis=-1, keepdims=True)
    return np.divide(axes, length, out=np.full_like(axes, np.nan), where=length > 0)


def balanced_axis(z: np.ndarray, arm: np.ndarray, kind: np.ndarray, kinds: list[str], weighting: str) -> np.ndarray:
    """The axis with the composition of cell types held equal: a mean of the types' own differences of means.

    Parameters
    ----------
    z, arm, kind
        Latents (n_cells, n_latent), arm and type of each cell.
    kinds
        Types with enough cells in both arms.
    weighting
        `equal`: types weigh alike. `pooled`: by their cells in both arms together.
    """
    differences, sizes = [], []
    for name in kinds:
        arms = [z[(kind == name) & (arm == k)] for k in (0, 1)]
        differences.append(arms[1].mean(axis=0, dtype=np.float64) - arms[0].mean(axis=0, dtype=np.float64))
        sizes.append(1 if weighting == "equal" else len(arms[0]) + len(arms[1]))
    return np.average(differences, axis=0, weights=sizes)


# --- draws of donors ----------------------------------------------------------------------------------------------


def observed_weights(arm: np.ndarray) -> Weights:
    """Every donor once (n_donors, 1)."""
    return Weights((arm == 0).astype(float)[:, None], (arm == 1).astype(float)[:, None])


def bootstrap_weights(arm: np.ndarray, n_draws: int, seed: int) -> Weights:
    """Donors resampled with replacement within each arm.

    Parameters
    ----------
    arm
        Arm of each donor, −1 for donors that take no part (n_donors,).

    Returns
    -------
    Weights
        All 0 where an arm has one donor: drawn again it would be the same, and the interval a point.
    """
    rng = np.random.default_rng([seed, 1])
    found = []
    alone = min((arm == 0).sum(), (arm == 1).sum()) < 2
    for k in (0, 1):
        weight = np.zeros((len(arm), n_draws))
        if alone:
            found.append(weight)
            continue
        inside = np.flatnonzero(arm == k)
        weight[inside] = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=n_draws).T
        found.append(weight)
    return Weights(*found)


def half_weights(arm: np.ndarray, n_splits: int, seed: int) -> tuple[Weights, Weights]:
    """Both halves of the donors of each arm, for some random splits; of an odd number one is left out."""
    rng = np.random.default_rng([seed, 2])
    halves = [np.zeros((2, len(arm), n_splits)) for _ in range(2)]
    for k in (0, 1):
        inside = np.flatnonzero(arm == k)
        size = len(inside) // 2
        for i in range(n_splits):
            order = rng.permutation(inside)
            halves[0][k, order[:size], i] = 1
            halves[1][k, order[size : 2 * size], i] = 1
    return Weights(*halves[0]), Weights(*halves[1])


class Permutations(NamedTuple):
    """Labels of donors, exchanged within studies."""

    weights: Weights
    n_possible: int
    """How many there are."""
    exact: bool
    """All of them are here, the observed one among them."""
    mixed: tuple[str, ...]
    """Studies with donors in both arms: only there labels move."""
    n_studies: int


def permute_labels(arm: np.ndarray, study: np.ndarray, n_draws: int, seed: int) -> Permutations:
    """Labels of donors exchanged within each study, whose numbers of either label stay as they are.

    Parameters
    ----------
    arm
        Arm of each donor, −1 for donors that take no part (n_donors,).
    study
        Study of each donor (n_donors,).
    n_draws
        How many to draw; all are taken where there are no more.
    seed
        Of the draws.
    """
    blocks = [np.flatnonzero((study == name) & (arm >= 0)) for name in sorted(set(study[arm >= 0]))]
    sizes = [(len(block), int((arm[block] == 1).sum())) for block in blocks]
    possible = int(np.prod([comb(n, k) for n, k in sizes], dtype=object))
    if possible <= n_draws:
        choices = product(*(combinations(block, k) for block, (_, k) in zip(blocks, sizes)))
        chosen = [np.concatenate([np.array(part, dtype=int) for part in choice]) for choice in choices]
    else:
        rng = np.random.default_rng([seed, 3])
        chosen = [
            np.concatenate([rng.choice(block, k, replace=False) for block, (_, k) in zip(blocks, sizes)])
            for _ in range(n_draws)
        ]
    perturbed = np.zeros((len(arm), len(chosen)))
    for i, rows in enumerate(chosen):
        perturbed[rows, i] = 1
    unperturbed = (arm >= 0)[:, None] - perturbed
    mixed = tuple(str(study[block[0]]) for block, (n, k) in zip(blocks, sizes) if 0 < k < n)
    return Permutations(Weights(unperturbed, perturbed), possible, possible <= n_draws, mixed, len(blocks))


def read_axis(path: str, n_latent: int) -> np.ndarray:
    """A given axis (n_latent,).

    Raises
    ------
    DataError
        If the file is missing or is no axis of the model.
    """
    import pandas as pd

    try:
        axis = pd.read_csv(path)["axis"].to_numpy(dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: no table with a column `axis` of numbers ({error})") from None
    if axis.shape != (n_latent,) or not np.isfinite(axis).all() or not axis.any():
        raise DataError(f"{path}: must hold {n_latent} finite numbers, one per latent of the model, not all 0")
    return axis
