"""Flows: follow the gradient of a gene, a set of genes or a head through latent space.

One step is `z ← z ± δ ∇_z y(z)`: plus for over-expression, minus for a knock-down (Bjerregaard et al. 2025). Several
perturbations at once add their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor

from perturbed.decoders.base import Context, Decoder, as_latents, take
from perturbed.gradients.jacobian import MEMORY_MB, gradients_of


class Move(NamedTuple):
    """One perturbation of a decoder's outputs."""

    targets: tuple[str, ...]
    """Genes or heads; their gradients are averaged."""
    sign: int = 1
    """+1 over-expression, −1 knock-down."""


class Trajectory(NamedTuple):
    """Cells on their way."""

    z: np.ndarray
    """Latents (n_steps + 1, n_cells, n_latent)."""
    outputs: np.ndarray
    """Outputs that were asked for, along the way (n_steps + 1, n_cells, n_outputs)."""
    names: tuple[str, ...]
    """Names of the outputs."""
    stopped: np.ndarray
    """True for cells that the manifold stopped (n_cells,)."""


class Field(NamedTuple):
    """A vector field on a grid over two latent dimensions."""

    x: np.ndarray
    """Grid in the first dimension (n_x,)."""
    y: np.ndarray
    """Grid in the second (n_y,)."""
    u: np.ndarray
    """First component, rows along y; NaN outside of the mask (n_y, n_x)."""
    v: np.ndarray
    """Second component (n_y, n_x)."""
    inside: np.ndarray
    """True where cells are (n_y, n_x)."""

    @property
    def speed(self) -> np.ndarray:
        """Length of the arrows (n_y, n_x)."""
        return np.hypot(self.u, self.v)


class Manifold:
    """Where cells are: a region around the posterior means of the cells a decoder was trained on.

    A point is inside when the distance to its k-th nearest cell is at most the `quantile` of the cells' own such
    distances. Lookup by k-d tree: O(log n) a point in few dimensions.

    Parameters
    ----------
    cells
        Posterior means (n_cells, n_latent).
    k
        Which neighbour.
    quantile
        Share of cells that are inside.
    """

    def __init__(self, cells: np.ndarray, *, k: int = 10, quantile: float = 0.99) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.k = min(k, len(cells) - 1)
        self.index = NearestNeighbors(n_neighbors=self.k + 1).fit(cells)
        self.radius = float(np.quantile(self.index.kneighbors(cells)[0][:, self.k], quantile))

    def holds(self, z: Tensor) -> Tensor:
        """Whether each point is inside (n_points,)."""
        distance, _ = self.index.kneighbors(z.numpy(force=True), n_neighbors=self.k)
        return torch.from_numpy(distance[:, -1] <= self.radius)


def velocity(
    decoder: Decoder,
    z: np.ndarray | Tensor,
    context: Context,
    moves: Sequence[Move],
    *,
    unit: bool = False,
    memory_mb: float = MEMORY_MB,
) -> Tensor:
    """Direction of a step: `Σ_moves sign · mean over targets of ∇_z y`.

    Parameters
    ----------
    decoder, z, context, memory_mb
        As in `perturbed.gradients.jacobian`.
    moves
        The perturbations.
    unit
        Scale every cell's direction to length 1; a zero gradient stays zero.

    Returns
    -------
    Tensor
        (n_cells, n_latent); one reverse pass, however many targets.

    Raises
    ------
    DataError
        If a target is no output of the decoder.
    """
    readout = torch.zeros(len(decoder.genes) + len(decoder.heads))
    for move in moves:
        columns = decoder.find(move.targets)
        readout[columns] += move.sign / len(columns)
    direction = gradients_of(decoder, as_latents(z), context, readout, memory_mb=memory_mb)
    if unit:
        length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        direction = torch.where(length > 0, direction / length.clamp_min(torch.finfo(length.dtype).tiny), direction)
    return direction


def follow(
    decoder: Decoder,
    z: np.ndarray | Tensor,
    context: Context,
    moves: Sequence[Move],
    *,
    n_steps: int = 20,
    delta: float = 0.05,
    unit: bool = False,
    manifold: Manifold | None = None,
    record: Sequence[str] = (),
    memory_mb: float = MEMORY_MB,
) -> Trajectory:
    """Follow a flow for some steps, decoding on the way.

    Parameters
    ----------
    decoder, z, context, moves, unit, memory_mb
        As in `velocity`.
    n_steps
        Number of steps.
    delta
        Step size δ (the paper's 0.05), in units of z per unit of gradient, or of z where `unit` is set.
    manifold
        Keep cells where cells are: a step that would leave is halved, at most five times, and else not made.
    record
        Outputs to decode along the way.
    """
    place = as_latents(z)
    columns = decoder.find(tuple(record))
    path, outputs = [place], [_decode(decoder, place, context, columns)]
    stopped = torch.zeros(len(place), dtype=torch.bool)
    for _ in range(n_steps):
        step = delta * velocity(decoder, place, context, moves, unit=unit, memory_mb=memory_mb)
        if manifold is not None:
            step, blocked = _stay_inside(manifold, place, step)
            stopped |= blocked
        place = place + step
        path.append(place)
        outputs.append(_decode(decoder, place, context, columns))
    return Trajectory(torch.stack(path).numpy(), torch.stack(outputs).numpy(), tuple(record), stopped.numpy())


@torch.no_grad()
def _decode(decoder: Decoder, z: Tensor, context: Context, columns: list[int]) -> Tensor:
    return decoder.outputs(z, context)[:, columns] if columns else z.new_zeros(len(z), 0)


def _stay_inside(manifold: Manifold, place: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    outside = ~manifold.holds(place + step)
    for _ in range(5):
        if not outside.any():
            break
        step = torch.where(outside[:, None], step / 2, step)
        rows = torch.nonzero(outside).ravel()
        outside[rows] = ~manifold.holds(place[rows] + step[rows])
    return torch.where(outside[:, None], torch.zeros_like(step), step), outside


def map_flow(
    decoder: Decoder,
    z: np.ndarray,
    context: Context,
    moves: Sequence[Move],
    *,
    n_grid: int = 35,
    margin: float = 1.15,
    quantile: float = 1e-4,
) -> Field:
    """The flow on a grid over a two-dimensional latent space, masked to where cells are.

    The box spans the `quantile` to `1 − quantile` of the cells, widened by `margin`; a grid point is inside when a
    cell lies in its square or in a neighbouring one. Each point takes the context of its nearest cell.

    Parameters
    ----------
    decoder, context, moves
        As in `velocity`; the context is that of the cells.
    z
        Posterior means of the cells (n_cells, 2).
    n_grid
        Points along each dimension (the paper's 35).
    margin, quantile
        As above (the paper's).

    Raises
    ------
    ValueError
        If the latent space is not two-dimensional.
    """
    from scipy.spatial import cKDTree

    if z.shape[1] != 2:
        raise ValueError(f"a flow map needs 2 latent dimensions, not {z.shape[1]}; project arrows instead")
    low, high = np.quantile(z, [quantile, 1 - quantile], axis=0)
    centre, half = (low + high) / 2, (high - low) / 2 * margin
    x, y = (np.linspace(centre[k] - half[k], centre[k] + half[k], n_grid) for k in (0, 1))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    nearest = torch.from_numpy(cKDTree(z).query(points)[1])
    arrows = velocity(decoder, points, take(context, nearest), moves).numpy().reshape(n_grid, n_grid, 2)
    edges = [np.concatenate([axis - (axis[1] - axis[0]) / 2, [axis[-1] + (axis[1] - axis[0]) / 2]]) for axis in (x, y)]
    counts = np.histogram2d(z[:, 1], z[:, 0], bins=[edges[1], edges[0]])[0]
    inside = binary_dilation(counts > 0)
    arrows = np.where(inside[..., None], arrows, np.nan)
    return Field(x, y, arrows[..., 0], arrows[..., 1], inside)
