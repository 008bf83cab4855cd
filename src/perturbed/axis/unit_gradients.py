r"""Sums of unit gradients: the score of every gene along any axis, without another derivative.

The score of gene g over cells Z along axis a (Bjerregaard et al. 2025) is linear in the unit axis:

.. math:: s_g = \frac{1}{|Z|} \sum_{z \in Z} \frac{\nabla y_g(z)}{|\nabla y_g(z)|} \cdot \frac{a}{|a|}
              = \bar u_g \cdot \frac{a}{|a|}.

So the mean unit gradient :math:`\bar u_g` of each donor's cells answers for every axis and every weighting of donors:
bootstrap draws and permuted labels are matrix products. Donors pass one at a time, and only what is made of them stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from perturbed.axis.axes import Weights
from perturbed.decoders.base import Context, Decoder, as_latents, take
from perturbed.gradients.jacobian import MEMORY_MB, jacobians

GENE_BLOCK = 512
"""Genes whose scores along all axes are made at once."""


class DonorGradients(NamedTuple):
    """Sums over the scored cells of one donor."""

    donor: int
    unit: np.ndarray
    """Sum of unit gradients (n_genes, n_latent), float32."""
    n_defined: np.ndarray
    """Cells whose gradient has a direction (n_genes,)."""
    norm: np.ndarray
    """Sum of the gradients' lengths (n_genes,)."""
    projection: np.ndarray
    """Sum of the gradients along the direction given (n_genes,)."""
    n_cells: int


class Scores(NamedTuple):
    """Mean cosines along many axes."""

    cosine: tuple[np.ndarray, np.ndarray]
    """Of the unperturbed and of the perturbed cells of each draw (n_genes, n_draws), float32; NaN where undefined."""
    norm: tuple[np.ndarray, np.ndarray]
    """Mean length of the gradients of the cells of the arms as they are (n_genes,)."""
    projection: tuple[np.ndarray, np.ndarray]
    """Mean gradient along the direction given (n_genes,)."""
    n_cells: tuple[int, int]


def sum_gradients(
    decoder: Decoder,
    z: np.ndarray,
    context: Context,
    donor: np.ndarray,
    direction: np.ndarray,
    *,
    logits: bool = False,
    min_norm: float = 1e-12,
    memory_mb: float = MEMORY_MB,
) -> Iterator[DonorGradients]:
    """Sums of unit gradients, donor by donor.

    Cost: one Jacobian per cell (`perturbed.gradients.jacobian`) and two passes over it.

    Parameters
    ----------
    decoder
        The decoder.
    z
        Latents of the cells (n_cells, n_latent).
    context
        Their context, one row per cell.
    donor
        Donor of each cell (n_cells,).
    direction
        Axis of the projections (n_latent,); its length does not matter.
    logits
        Gradients of what stands before the decoder's link.
    min_norm
        A gradient whose length, relative to the longest of that cell, is at most this has no direction.
    memory_mb
        Budget of the largest temporary array.
    """
    latents = as_latents(z)
    length = np.linalg.norm(direction)
    along = torch.as_tensor(direction / length, dtype=torch.float32)
    n_genes = len(decoder.genes)
    for d in np.unique(donor):
        rows = torch.from_numpy(np.flatnonzero(donor == d))
        own, inside = latents[rows], take(context, rows)
        unit = torch.zeros(n_genes, decoder.n_latent)
        defined, norms, projected = (torch.zeros(n_genes, dtype=torch.float64) for _ in range(3))
        for chunk in jacobians(
            decoder, own, inside, direction=along.expand_as(own), logits=logits, memory_mb=memory_mb
        ):
            assert chunk.projected is not None
            norm = torch.linalg.vector_norm(chunk.values, dim=2)
            real = norm * chunk.slope
            has = real > min_norm * real.amax(dim=0, keepdim=True)
            weight = torch.where(has, 1 / torch.where(has, norm, torch.ones_like(norm)), torch.zeros_like(norm))
            unit += torch.bmm(weight[:, None], chunk.values)[:, 0]
            defined += has.sum(dim=1)
            norms += real.sum(dim=1, dtype=torch.float64)
            projected += (chunk.projected * chunk.slope).sum(dim=1, dtype=torch.float64)
        yield DonorGradients(int(d), unit.numpy(), defined.numpy(), norms.numpy(), projected.numpy(), len(rows))


def score_along(
    gradients: Iterator[DonorGradients], axes: np.ndarray, weights: Weights, observed: np.ndarray, n_genes: int
) -> Scores:
    """Score all genes along many axes, each with its own weighting of donors.

    Parameters
    ----------
    gradients
        What `sum_gradients` yields.
    axes
        Unit axes (n_draws, n_latent); NaN for draws without one.
    weights
        Weights of the donors in both arms of each draw.
    observed
        Arm of each donor as it is (n_donors,).
    n_genes
        Number of genes.
    """
    n_draws = len(axes)
    matrix = np.ascontiguousarray(np.nan_to_num(axes).T.astype(np.float32))
    totals = [np.zeros((n_genes, n_draws), dtype=np.float32) for _ in range(2)]
    n_defined = np.zeros((len(observed), n_genes), dtype=np.float32)
    norm, projection = (np.zeros((2, n_genes)) for _ in range(2))
    n_cells = np.zeros(2, dtype=int)
    for part in gradients:
        k = int(observed[part.donor])
        norm[k] += part.norm
        projection[k] += part.projection
        n_cells[k] += part.n_cells
        n_defined[part.donor] = part.n_defined
        for start in range(0, n_genes, GENE_BLOCK):
            block = slice(start, start + GENE_BLOCK)
            along = part.unit[block] @ matrix
            for total, weight in zip(totals, weights):
                w = weight[part.donor].astype(np.float32)
                if w.any():
                    total[block] += along * w
    found = tuple(_means(total, n_defined, weight, axes) for total, weight in zip(totals, weights))
    count = np.maximum(n_cells, 1)[:, None]
    norm, projection = norm / count, projection / count
    return Scores(
        (found[0], found[1]), (norm[0], norm[1]), (projection[0], projection[1]), (int(n_cells[0]), int(n_cells[1]))
    )


def _means(total: np.ndarray, n_defined: np.ndarray, weight: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Totals over defined cells, in place, block by block."""
    weight = weight.astype(np.float32)
    for start in range(0, len(total), GENE_BLOCK):
        block = slice(start, start + GENE_BLOCK)
        count = n_defined[:, block].T @ weight
        total[block] = np.divide(total[block], count, out=np.full_like(count, np.nan), where=count > 0)
    total[:, ~np.isfinite(axes).all(axis=1)] = np.nan
    return total
