"""Gene scores along an axis of the latent space: `s_g = mean over cells of cos(∇_z y_g(z), a)`.

Source of the score: Bjerregaard et al. 2025, Genes 16:1439. The cosine does not see the size of a gradient, so genes
whose gradients are numerically nothing are left undefined by a stated rule (`min_norm`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbed.decoders.base import Context, Decoder, as_latents
from perturbed.gradients.jacobian import MEMORY_MB, CellJacobian, jacobians


class GroupScores(NamedTuple):
    """Averages over the cells of each group, in float64."""

    cosine: np.ndarray
    """Mean cosine (n_groups, n_genes); NaN where no cell of the group has a gradient above `min_norm`."""
    projection: np.ndarray
    """Mean of `∇y_g · a / |a|` on the scale of the expression (n_groups, n_genes)."""
    norm: np.ndarray
    """Mean of `|∇y_g|`, same scale (n_groups, n_genes)."""
    n_defined: np.ndarray
    """Cells whose cosine is defined (n_groups, n_genes)."""
    n_cells: np.ndarray
    """Cells of each group (n_groups,)."""

    def pooled(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Mean cosine over groups (n_genes,): cells weigh the same, or groups by `weights` (n_groups,)."""
        weight = self.n_defined if weights is None else weights[:, None] * (self.n_defined > 0)
        total = weight.sum(axis=0)
        summed = (weight * np.nan_to_num(self.cosine)).sum(axis=0)  # an undefined cosine has weight 0
        return np.divide(summed, total, out=np.full(summed.shape, np.nan), where=total > 0)


def score_genes(
    decoder: Decoder,
    z: np.ndarray | Tensor,
    context: Context,
    axis: np.ndarray | Tensor,
    *,
    groups: np.ndarray | None = None,
    n_groups: int | None = None,
    logits: bool = False,
    min_norm: float = 1e-12,
    memory_mb: float = MEMORY_MB,
) -> GroupScores:
    """Score all genes of a decoder along an axis.

    Cost: one Jacobian per cell, of which only sums per group are kept.

    Parameters
    ----------
    decoder
        The decoder.
    z
        Latents (n_cells, n_latent).
    context
        Their context, one row per cell.
    axis
        The axis a (n_latent,), one for all cells, or one per cell (n_cells, n_latent).
    groups
        Group of each cell from 0 (n_cells,), such as its donor; None puts all in one.
    n_groups
        Number of groups, where some may be empty.
    logits
        Score what stands before the decoder's link: softmax couples genes, logits do not.
    min_norm
        A gradient whose norm, relative to the largest of that cell, is at most this has no direction.
    memory_mb
        Budget of the largest temporary array.

    Raises
    ------
    ValueError
        If the axis is zero or not finite, or shapes do not agree.
    """
    latents = as_latents(z)
    unit = _unit(axis, latents)
    group = np.zeros(len(latents), dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    if len(group) != len(latents):
        raise ValueError(f"{len(group)} groups for {len(latents)} cells")
    count = int(group.max(initial=0)) + 1 if n_groups is None else n_groups
    sums = _Sums(count, len(decoder.genes))
    for chunk in jacobians(decoder, latents, context, direction=unit, logits=logits, memory_mb=memory_mb):
        sums.add(chunk, group[chunk.cells], min_norm)
    return sums.means(np.bincount(group, minlength=count))


def _unit(axis: np.ndarray | Tensor, z: Tensor) -> Tensor:
    tensor = torch.as_tensor(np.asarray(axis), dtype=torch.float32)
    if tensor.shape[-1] != z.shape[1]:
        raise ValueError(f"axis has {tensor.shape[-1]} dimensions, the latents have {z.shape[1]}")
    length = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise ValueError("the axis has no direction (zero or not finite); are the two groups the same cells?")
    return (tensor / length).expand_as(z).to(z.device)


class _Sums:
    """Running sums per group."""

    def __init__(self, n_groups: int, n_genes: int) -> None:
        self.totals = {key: np.zeros((n_groups, n_genes)) for key in ("cosine", "projection", "norm", "n_defined")}

    def add(self, chunk: CellJacobian, group: np.ndarray, min_norm: float) -> None:
        values, slope, dot = chunk.values, chunk.slope, chunk.projected
        assert dot is not None
        norm = torch.linalg.vector_norm(values, dim=2)
        real = norm * slope
        defined = real > min_norm * real.amax(dim=0, keepdim=True)
        cosine = torch.where(defined, dot / torch.where(defined, norm, torch.ones_like(norm)), torch.zeros_like(dot))
        parts = {"cosine": cosine, "projection": dot * slope, "norm": real, "n_defined": defined}
        present = np.unique(group)
        for k in present:
            inside = torch.from_numpy(np.flatnonzero(group == k)).to(values.device) if len(present) > 1 else None
            for key, part in parts.items():
                chosen = part if inside is None else part[:, inside]  # indexing would copy
                self.totals[key][k] += chosen.sum(dim=1, dtype=torch.float64).cpu().numpy()

    def means(self, n_cells: np.ndarray) -> GroupScores:
        t = self.totals
        per_cell = np.maximum(n_cells, 1)[:, None]
        cosine = np.divide(t["cosine"], t["n_defined"], out=np.full_like(t["cosine"], np.nan), where=t["n_defined"] > 0)
        return GroupScores(
            cosine, t["projection"] / per_cell, t["norm"] / per_cell, t["n_defined"].astype(int), n_cells
        )
