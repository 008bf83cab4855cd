"""The network of the discrepancy-VAE: encoder, soft intervention targets, causal layer, decoder, loss and schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perturbed.models.cells import Batch
from perturbed.models.nn.mlp import ACTIVATIONS, MLP, build_mlp
from perturbed.models.nn.mmd import gaussian_mmd

VARIANCE_FLOOR = 1e-6
"""Keeps log variance finite in float32."""


class Weights(NamedTuple):
    """What changes over training."""

    mmd: float
    """Weight α of the discrepancy."""
    kl: float
    """Weight β of the KL, summed over latents and averaged over cells."""
    edges: float
    """Weight of the L1 norm of the graph."""
    temperature: float
    """Factor on the logits of the intervention targets."""


class LossTerms(NamedTuple):
    """Terms of the loss, each unweighted but the first."""

    loss: Tensor
    mmd: Tensor
    reconstruction: Tensor
    kl: Tensor
    edges: Tensor


def ramp(epoch: int, first: int, last: int, start: float, end: float) -> float:
    """Value that goes linearly from `start` in epoch `first` to `end` in epoch `last` and is constant outside."""
    if epoch >= last:
        return end
    return start + (end - start) * max(0, epoch - first) / (last - first)


def mmd_weight(epoch: int, n_epochs: int, full: float) -> float:
    """Weight of the discrepancy: 0 for a twentieth of the epochs, `full` from the middle on.

    The published epochs are 5 and 50 of 100; in shorter and longer runs these and the other delays are the same shares.
    """
    return ramp(epoch, n_epochs // 20, n_epochs // 2 - 1, 0.0, full)


def kl_weight(epoch: int, n_epochs: int, full: float) -> float:
    """Weight of the KL: 0 for a tenth of the epochs (published: 10 of 100), then up to `full` in the last."""
    return ramp(epoch, n_epochs // 10, n_epochs - 1, 0.0, full)


def target_temperature(epoch: int, n_epochs: int, full: float) -> float:
    """Temperature of the targets: 1 for a twentieth of the epochs, then up to `full` in the last."""
    return ramp(epoch, n_epochs // 20, n_epochs - 1, 1.0, full)


def condition_batches(
    group: np.ndarray, rows: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of one epoch, each of one group, in random order.

    Cells that do not fill a batch of their group sit out this epoch, others the next, as published. A group smaller
    than a batch is a batch of its own; published, it would never be trained on.

    Parameters
    ----------
    group
        Group of every cell (n_cells,).
    rows
        Rows of the training cells.
    batch_size
        Cells of a batch.
    rng
        Draws the order of cells and of batches.
    """
    shuffled = rng.permutation(rows)
    by_group = shuffled[np.argsort(group[shuffled], kind="stable")]
    edges = np.flatnonzero(np.diff(group[by_group])) + 1
    batches = []
    for cells in np.split(by_group, edges):
        n_full = max(1, len(cells) // batch_size)
        batches += [cells[i * batch_size : (i + 1) * batch_size] for i in range(n_full)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


class GeneSetLinear(nn.Linear):
    """A linear map from genes to gene sets whose weights are multiplied by a fixed mask.

    Parameters
    ----------
    mask
        1 for members, λ for the rest (n_sets, n_genes).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Activity of the gene sets (n_cells, n_sets)."""
        return F.linear(x, self.weight * self.mask, self.bias)


class DiscrepancyVAEModule(nn.Module):
    """The discrepancy-VAE (Zhang et al. 2023).

    A control cell x has exogenous latents `z ~ N(m(x), v(x))`; perturbed gene g adds `s_g · softmax(T · f(g))` to them;
    the causal layer gives `u = z (I − triu(G, 1))⁻¹`, and the decoder the cell.

    Parameters
    ----------
    n_genes, n_perturbed
        Numbers of measured and of perturbed genes.
    n_latent, n_hidden
        Latents, and width of the hidden layer of encoder, targets and decoder.
    mask
        Mask of the encoder's first layer (n_sets, n_genes), which then has `n_sets` units; None for a dense one.
    """

    def __init__(
        self, n_genes: int, n_perturbed: int, n_latent: int, n_hidden: int, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        first = nn.Linear(n_genes, n_hidden) if mask is None else GeneSetLinear(mask)
        posterior = nn.Linear(first.out_features, 2 * n_latent)
        self.encoder = MLP(first, ACTIVATIONS["leaky_relu"](), posterior)
        self.graph = nn.Parameter(0.1 * torch.randn(n_latent, n_latent))
        self.target_in = nn.Linear(n_perturbed, n_hidden)
        self.target_out = nn.Linear(n_hidden, n_latent)
        self.strength = nn.Parameter(torch.ones(n_perturbed))
        self.decoder = build_mlp((n_latent, n_hidden, n_genes), last=True)
        for layer in (first, posterior, *self.decoder):  # as published: output near 0 at the start
            if type(layer) is nn.Linear:
                nn.init.normal_(layer.weight, 0.0, 0.02)
                nn.init.zeros_(layer.bias)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the exogenous latents of cells (n_cells, n_latent)."""
        mean, raw = self.encoder(x).chunk(2, dim=1)
        return mean, F.softplus(raw) + VARIANCE_FLOOR

    def targets(self, perturbed: Tensor, temperature: float) -> Tensor:
        """Distribution over latents that the perturbation of each gene acts on (n, n_latent); rows sum to 1.

        Parameters
        ----------
        perturbed
            Positions of perturbed genes (n,).
        temperature
            Factor on the logits: 0 spreads a perturbation over all latents, a large one picks one latent.
        """
        # the first layer of a one-hot vector is one column of its weights
        hidden = F.leaky_relu(self.target_in.weight[:, perturbed].T + self.target_in.bias, 0.2)
        logits = self.target_out(hidden).to(hidden.dtype)  # autocast may have multiplied in less
        return torch.softmax(logits * temperature, dim=1)

    def shift(self, conditions: Tensor, temperature: float) -> Tensor:
        """What conditions add to the exogenous latents: the sum of their genes' shifts (n_conditions, n_latent).

        Parameters
        ----------
        conditions
            Multi-hot (n_conditions, n_perturbed); any number of genes, none for control.
        temperature
            See `targets`.
        """
        used = torch.nonzero(conditions.any(0)).ravel()
        single = self.targets(used, temperature) * self.strength[used].unsqueeze(1)
        return (conditions[:, used] @ single).to(single.dtype)

    def causal(self, z: Tensor) -> Tensor:
        """Causal latents `u = z (I − triu(G, 1))⁻¹` by a triangular solve (n_cells, n_latent)."""
        identity = torch.eye(len(self.graph), dtype=z.dtype, device=z.device)
        system = identity - self.graph.triu(1)
        return torch.linalg.solve_triangular(system, z, upper=True, left=False, unitriangular=True)

    def decode(self, u: Tensor) -> Tensor:
        """Cells from causal latents (n_cells, n_genes)."""
        return self.decoder(u)

    def loss(self, batch: Batch, noise: Tensor, weights: Weights, bandwidths: Sequence[float]) -> LossTerms:
        """`α MMD(perturbed cells, intervened control cells) + MSE(control cells) + β KL + λ ‖triu(G, 1)‖₁`.

        Parameters
        ----------
        batch
            Perturbed cells and their control partners. Cells of several conditions are compared within their own.
        noise
            Standard normal draws (n_cells, n_latent); the same for a control cell and its intervened twin.
        weights
            Weights and temperature of this epoch.
        bandwidths
            Widths of the kernels of the discrepancy.
        """
        n = len(batch.condition)
        perturbed, control = batch.x[:n], batch.x[n:]
        mean, variance = self.encode(control)
        z = mean + variance.sqrt() * noise
        shift = self.shift(batch.conditions, weights.temperature)[batch.condition]
        decoded = self.decode(self.causal(torch.cat([z, z + shift])))
        reconstruction = F.mse_loss(decoded[:n], control)
        group = batch.condition if len(batch.conditions) > 1 else None
        mmd = gaussian_mmd(decoded[n:], perturbed, bandwidths, group)
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum() / n
        edges = self.graph.triu(1).abs().sum()
        total = weights.mmd * mmd + reconstruction + weights.kl * kl + weights.edges * edges
        return LossTerms(total, mmd, reconstruction, kl, edges)
