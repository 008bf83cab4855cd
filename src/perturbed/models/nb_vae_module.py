"""The network of the decoder arm: a plain VAE of cells, with any number of heads that read the latent space.

Source: Bjerregaard et al. 2025 (Genes 16:1439) and its authors' code: 512-512-256 SiLU, softplus mean scaled by the
cell's mean count, gene-wise dispersion, summed KL, further outputs for labels and times.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perturbed.config import Section
from perturbed.models.nn.likelihoods import Counts, gaussian_loss, nb_loss
from perturbed.models.nn.mlp import Activation, build_mlp
from perturbed.models.nn.scm import kl_diagonal


class Architecture(Section):
    """Shape of the network."""

    n_latent: int = Field(2, ge=1)
    """Dimensions of z; 2 gives flow maps without projection."""
    hidden: tuple[int, ...] = Field((512, 512, 256), min_length=1)
    """Widths of the encoder's hidden layers; the decoder has them in reverse order."""
    activation: Activation = "silu"
    """Activation of the hidden layers."""
    likelihood: Literal["nb", "gaussian"] = "nb"
    """`nb` on counts; `gaussian` on log-normalised expression, for data without counts."""


HeadKind = Literal["binary", "continuous"]


class Batch(NamedTuple):
    """Cells of a training step."""

    x: Tensor
    """Input of the encoder (n_cells, n_genes)."""
    labels: Tensor
    """Values of the heads; NaN where masked or unknown (n_cells, n_heads)."""
    counts: Counts | None
    """Counts, with `size` the mean count of each cell; None for the Gaussian likelihood."""


class LossTerms(NamedTuple):
    """Terms of the loss, averaged over cells."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    heads: Tensor


class NBVAEModule(nn.Module):
    """Encoder, decoder and heads.

    Parameters
    ----------
    n_genes
        Width of the expression.
    kinds
        Kind of each head.
    architecture
        The options.
    """

    head_centre: Tensor
    head_scale: Tensor

    def __init__(self, n_genes: int, kinds: tuple[HeadKind, ...], architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.kinds, self.n_genes = architecture, kinds, n_genes
        a = architecture
        self.encoder = build_mlp((n_genes, *a.hidden, 2 * a.n_latent), a.activation)
        self.trunk = build_mlp((a.n_latent, *reversed(a.hidden)), a.activation, last=True)
        self.output = nn.Linear(a.hidden[0], n_genes + len(kinds))
        # inverse dispersion of counts (starts at 2, as the authors'), or nothing for the squared error
        start = torch.full((n_genes,), 2.0).log() if a.likelihood == "nb" else torch.zeros(n_genes)
        self.log_dispersion = nn.Parameter(start)
        self.register_buffer("head_centre", torch.zeros(len(kinds)))
        self.register_buffer("head_scale", torch.ones(len(kinds)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of z (n_cells, n_latent) from the encoder's input."""
        mean, raw = self.encoder(x).chunk(2, dim=1)
        return mean, F.softplus(raw) + 1e-6

    def activations(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before the links: of genes (n_cells, n_genes); heads, in their own units (n_cells, n_heads)."""
        out = self.output(self.trunk(z))
        return out[:, : self.n_genes], out[:, self.n_genes :] * self.head_scale + self.head_centre

    def expression(self, activation: Tensor) -> Tensor:
        """Mean expression: of counts in units of the cell's mean count (NB), or log-normalised (Gaussian)."""
        return F.softplus(activation) if self.architecture.likelihood == "nb" else activation

    def loss(self, batch: Batch, noise: Tensor, *, kl_weight: float, head_weights: Tensor) -> LossTerms:
        """`reconstruction + kl_weight KL + Σ_h weight_h error_h`, averaged over cells.

        The reconstruction is the negative log-likelihood summed over genes, the error of a head is binary
        cross-entropy or absolute error, over the cells whose label is known.

        Parameters
        ----------
        batch
            Cells.
        noise
            Standard normal draws (n_cells, n_latent).
        kl_weight
            β of this epoch.
        head_weights
            (n_heads,).
        """
        mean, variance = self.encode(batch.x)
        activation, heads = self.activations(mean + variance.sqrt() * noise)
        kl = kl_diagonal(mean, variance).mean()
        if batch.counts is None:
            reconstruction = gaussian_loss(batch.x, activation, self.log_dispersion, "sum")
        else:
            log_mean = torch.log(F.softplus(activation) + 1e-8) + torch.log(batch.counts.size).unsqueeze(1)
            reconstruction = nb_loss(batch.counts, log_mean, self.log_dispersion, "sum")
        errors = self.head_errors(heads, batch.labels)
        total = reconstruction + kl_weight * kl + (head_weights * errors).sum()
        return LossTerms(total, reconstruction, kl, errors.sum())

    def head_errors(self, heads: Tensor, labels: Tensor) -> Tensor:
        """Error of each head summed over its labelled cells, per cell of the batch (n_heads,)."""
        errors = []
        for k, kind in enumerate(self.kinds):
            known = torch.isfinite(labels[:, k])
            value, label = heads[known, k], labels[known, k]
            if kind == "binary":
                error = F.binary_cross_entropy_with_logits(value, label, reduction="sum")
            else:
                error = (value - label).abs().sum() / self.head_scale[k]
            errors.append(error / len(labels))
        return torch.stack(errors) if errors else heads.new_zeros(0)
