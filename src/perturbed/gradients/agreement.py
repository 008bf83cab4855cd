"""Does a flow point where the perturbed cells are? Cosines with intervals, arrivals and nulls.

The question is asked per group of cells (such as a cell type): the observed shift is the difference of mean latents,
perturbed minus unperturbed; the flow is the mean velocity on the unperturbed cells. The unit of the bootstrap is the
cell, or the replicate (donor, batch) where there are any.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbed.decoders.base import Context, Decoder, as_latents
from perturbed.gradients.jacobian import MEMORY_MB, jacobians


class Agreement(NamedTuple):
    """Cosine of two mean vectors, with its interval and its null."""

    cosine: float
    """Cosine of the mean flow and the observed shift."""
    low: float
    """Lower end of the bootstrap interval."""
    high: float
    """Upper end."""
    p: float
    """Share of label permutations whose shift reaches at least as far along the flow, counting the observed one.

    Not their cosine: where one direction holds most of the variance, a shift of permuted labels lies along it too, one
    way or the other, however short it is."""
    null_mean: float
    """Mean cosine under permuted labels."""
    null_high: float
    """Their upper quantile at the same level."""
    n_unperturbed: int
    n_perturbed: int
    n_units: int
    """Replicates, or cells where there are none."""


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; NaN where a vector is zero.

    Parameters
    ----------
    a, b
        Vectors (..., n_dimensions), broadcast against each other.
    """
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dot = (a * b).sum(axis=-1)
    return np.divide(dot, length, out=np.full(np.shape(dot), np.nan), where=length > 0)


def compare_with_shift(
    flow: np.ndarray,
    z: np.ndarray,
    perturbed: np.ndarray,
    *,
    replicates: np.ndarray | None = None,
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Cosine of the mean flow on unperturbed cells with the observed shift.

    Bootstrap: unperturbed and perturbed units are resampled apart; flow and start come from the same unperturbed draw,
    since both are functions of the same cells. Permutations exchange the labels of units and recompute flow and shift.
    With replicates a unit's vectors are means over its cells, and units weigh the same.

    Parameters
    ----------
    flow
        Velocity of every cell (n_cells, n_latent).
    z
        Posterior mean of every cell (n_cells, n_latent).
    perturbed
        True for perturbed cells (n_cells,).
    replicates
        Replicate of every cell (n_cells,); None takes cells as units.
    n_bootstrap, n_permutations, confidence, seed
        Of the interval and the null.

    Raises
    ------
    ValueError
        If one of the groups has fewer than two units.
    """
    vectors, labels = _units(np.hstack([z, flow]), perturbed, replicates)
    n_latent = z.shape[1]
    control, treated = vectors[~labels], vectors[labels, :n_latent]
    if min(len(control), len(treated)) < 2:
        raise ValueError(f"{len(control)} unperturbed and {len(treated)} perturbed units; at least 2 of each needed")
    rng = np.random.default_rng(seed)
    draws = np.array([_one_draw(control, treated, n_latent, rng) for _ in range(n_bootstrap)])
    observed = float(_agree(control.mean(axis=0), treated.mean(axis=0), n_latent))
    reach = _reach(control.mean(axis=0), treated.mean(axis=0), n_latent)
    null, null_reach = np.empty(n_permutations), np.empty(n_permutations)
    for i in range(n_permutations):
        shuffled = rng.permutation(labels)
        means = vectors[~shuffled].mean(axis=0), vectors[shuffled, :n_latent].mean(axis=0)
        null[i], null_reach[i] = _agree(*means, n_latent), _reach(*means, n_latent)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail]) if np.isfinite(observed) else (np.nan, np.nan)
    p = (1 + (null_reach >= reach).sum()) / (1 + n_permutations) if np.isfinite(observed) else np.nan
    return Agreement(
        observed,
        float(low),
        float(high),
        float(p),
        float(np.nanmean(null)),
        float(np.nanquantile(null, confidence)),
        int((~perturbed).sum()),
        int(perturbed.sum()),
        len(labels),
    )


def _agree(control: np.ndarray, treated: np.ndarray, n_latent: int) -> np.ndarray:
    return cosine(control[n_latent:], treated - control[:n_latent])


def _reach(control: np.ndarray, treated: np.ndarray, n_latent: int) -> float:
    """Length of the shift along the unit flow."""
    flow, shift = control[n_latent:], treated - control[:n_latent]
    return float(flow @ shift / max(float(np.linalg.norm(flow)), np.finfo(float).tiny))


def _one_draw(control: np.ndarray, treated: np.ndarray, n_latent: int, rng: np.random.Generator) -> float:
    from_control = control[rng.integers(len(control), size=len(control))].mean(axis=0)
    from_treated = treated[rng.integers(len(treated), size=len(treated))].mean(axis=0)
    return float(_agree(from_control, from_treated, n_latent))


def _units(values: np.ndarray, perturbed: np.ndarray, replicates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and labels of the units; a replicate that holds both kinds of cell gives two."""
    if replicates is None:
        return values.astype(np.float64), np.asarray(perturbed, dtype=bool)
    keys = np.array([f"{int(label)}|{name}" for label, name in zip(perturbed, replicates)])
    names, place = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None], np.array([name.startswith("1|") for name in names])


def mean_gradients(
    decoder: Decoder,
    z: np.ndarray | Tensor,
    context: Context,
    groups: np.ndarray,
    n_groups: int,
    *,
    memory_mb: float = MEMORY_MB,
) -> np.ndarray:
    """Mean gradient of every gene over the cells of each group, in one streaming pass (n_groups, n_genes, n_latent).

    The flow of every gene at once, so that a target can be ranked among genes like it.
    """
    latents = as_latents(z)
    total = np.zeros((n_groups, len(decoder.genes), latents.shape[1]))
    for chunk in jacobians(decoder, latents, context, memory_mb=memory_mb):
        group = groups[chunk.cells]
        for k in np.unique(group):
            rows = torch.from_numpy(np.flatnonzero(group == k))
            summed = torch.einsum("gnk,gn->gk", chunk.values[:, rows], chunk.slope[:, rows])
            total[k] += summed.double().numpy()
    return total / np.maximum(np.bincount(groups, minlength=n_groups), 1)[:, None, None]


def match_genes(
    mean: np.ndarray, variance: np.ndarray, targets: np.ndarray, n_genes: int, *, seed: int = 0
) -> np.ndarray:
    """For each target, genes that are expressed alike: the nearest in rank of mean and of variance.

    Parameters
    ----------
    mean, variance
        Of each gene over unperturbed cells (n_genes_all,).
    targets
        Columns of the targets (n_targets,); never chosen themselves.
    n_genes
        How many to choose for each, from the `4 n_genes` nearest, at random.
    seed
        Of that draw.

    Returns
    -------
    ndarray
        Columns (n_targets, n_genes); fewer where the decoder has fewer genes.
    """
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (mean, variance)], axis=1) / max(len(mean) - 1, 1)
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(mean)), targets)
    size = min(n_genes, len(others))
    chosen = np.empty((len(targets), size), dtype=int)
    for row, target in enumerate(targets):
        distance = np.abs(ranks[others] - ranks[target]).max(axis=1)
        nearest = others[np.argsort(distance, kind="stable")[: 4 * size]]
        chosen[row] = rng.permutation(nearest)[:size]
    return chosen


def arrivals(z_end: np.ndarray, start_mean: np.ndarray, goal_mean: np.ndarray) -> np.ndarray:
    """Whether each cell ends nearer the perturbed than the unperturbed mean (n_cells,).

    Parameters
    ----------
    z_end
        Where cells end (n_cells, n_latent).
    start_mean, goal_mean
        Mean latents of unperturbed and of perturbed cells (n_latent,).
    """
    return np.linalg.norm(z_end - goal_mean, axis=1) < np.linalg.norm(z_end - start_mean, axis=1)
