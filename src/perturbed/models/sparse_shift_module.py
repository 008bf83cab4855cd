"""Networks of the VAEs whose perturbations shift few latents: SAMS-VAE and sVAE+, and the terms of their losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perturbed.config import Section
from perturbed.models.nn.likelihoods import Counts, gaussian_loss, nb_loss
from perturbed.models.nn.mlp import Activation, build_mlp
from perturbed.models.nn.scm import kl_diagonal
from perturbed.training import Random

GAIN = 10.0
"""Factor between parameters and what is learned of a perturbation (shift and logit of its mask).

Adam moves every parameter by about its learning rate a step, however small the gradient, and logits and shifts must
travel by several units on the few steps that small data give.
"""
LOG_SD_FLOOR = math.log(0.05)
"""Smallest log observation noise; the density of a gene that is 0 in all training cells would else have no bound."""
START_SD = 0.1
"""Posterior sd of the shifts before training; the prior's would drown the first epochs in noise."""


class SparseShiftArchitecture(Section):
    """Shape of the network; the defaults are those published for SAMS-VAE and its sVAE+ on Norman's cells."""

    n_latent: int = Field(200, ge=1)
    """Latents. The masks switch off what a perturbation does not need; lower it for small data."""
    n_hidden: int = Field(400, ge=1)
    """Width of every hidden layer."""
    n_hidden_layers: int = Field(1, ge=1)
    """Hidden layers of the encoder and of the decoder (published: 1, 2 and 4 tried). Deepen only for many cells."""
    activation: Activation = "leaky_relu"
    """Activation of the hidden layers."""
    likelihood: Literal["gaussian", "nb"] = "nb"
    """`nb` on counts, given the cell's library size, as published; `gaussian` on log-normalised expression, with a
    noise learned for each gene, where the data hold no counts."""


class ShiftBatch(NamedTuple):
    """Cells of a training step."""

    x: Tensor
    """Log-normalised expression (n_cells, n_genes)."""
    conditions: Tensor
    """Multi-hot of the distinct conditions in the batch (n_conditions, n_perturbed)."""
    condition: Tensor
    """Row of `conditions` of each cell (n_cells,)."""
    pair_cell: Tensor
    """Cell of every pair of a cell with one of its perturbed genes (n_pairs,)."""
    pair_gene: Tensor
    """Perturbed gene of every pair (n_pairs,)."""
    counts: Counts | None = None
    """Counts of the cells, for a count likelihood."""


class SparseShiftTerms(NamedTuple):
    """Every term of the loss in nats per cell; only the first is minimised."""

    loss: Tensor
    reconstruction: Tensor
    kl_latent: Tensor
    kl_global: Tensor


def kl_bernoulli(logit: Tensor, prior: float) -> Tensor:
    """`KL(Bernoulli(q) ‖ Bernoulli(p)) = q log(q/p) + (1 − q) log((1 − q)/(1 − p))`, elementwise, in nats.

    q is given by its logit, which keeps the gradient finite where q rounds to 0 or 1.
    """
    q = torch.sigmoid(logit)
    return q * (F.logsigmoid(logit) - math.log(prior)) + (1 - q) * (F.logsigmoid(-logit) - math.log1p(-prior))


def kl_normal(mean: Tensor, sd: Tensor, prior_sd: float) -> Tensor:
    """`KL(N(mean, sd²) ‖ N(0, prior_sd²))`, elementwise, in nats."""
    return 0.5 * ((sd / prior_sd).square() + (mean / prior_sd).square() - 1) - torch.log(sd / prior_sd)


def draw_masks(logit: Tensor, random: Random) -> Tensor:
    """Draw binary masks with a gradient: `1[logit + logistic noise > 0]`, differentiated as its sigmoid.

    The straight-through relaxed Bernoulli at temperature 1.
    """
    u = torch.rand(logit.shape, generator=random.torch, device=logit.device).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid(logit + torch.logit(u).to(logit.dtype))
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


class SparseShiftModule(nn.Module, ABC):
    """Encoder, decoder, and a table of masked shifts in latent space, one row a perturbed gene.

    Parameters
    ----------
    n_genes, n_perturbed
        Width of the expression, number of perturbed genes.
    architecture
        The options.
    logit
        Logit of every mask's probability before training.
    sees_shift
        Whether the encoder takes the shift of a cell's latents beside its expression.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbed: int,
        architecture: SparseShiftArchitecture,
        *,
        logit: float = 0.0,
        sees_shift: bool = False,
    ) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.sees_shift = sees_shift
        hidden = [a.n_hidden] * a.n_hidden_layers
        self.encoder = build_mlp((n_genes + a.n_latent * sees_shift, *hidden), a.activation, last=True)
        self.head = nn.Linear(a.n_hidden, 2 * a.n_latent)
        self.decoder = build_mlp((a.n_latent, *hidden, n_genes), a.activation)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))
        self._shift = nn.Parameter(torch.zeros(n_perturbed, a.n_latent))
        self._logit = nn.Parameter(torch.full((n_perturbed, a.n_latent), logit / GAIN))

    @property
    def logit(self) -> Tensor:
        """Logit of the posterior probability that a perturbation shifts a latent (n_perturbed, n_latent)."""
        return GAIN * self._logit

    @property
    def shift(self) -> Tensor:
        """Mean shift where the mask is on (n_perturbed, n_latent)."""
        return GAIN * self._shift

    @torch.no_grad()
    def start_at(self, centre: Tensor, output: Tensor, log_dispersion: Tensor) -> None:
        """Begin where the data are: the encoder sees `x − centre`, the decoder's bias is `output` (n_genes,)."""
        first, last = self.encoder[0], self.decoder[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        first.bias.sub_(first.weight[:, : len(centre)] @ centre)
        last.bias.copy_(output)
        self.log_dispersion.copy_(log_dispersion)

    def encode(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latents of cells, each (n_cells, n_latent).

        Parameters
        ----------
        x
            Log-normalised expression (n_cells, n_genes).
        shift
            Shift of each cell's latents (n_cells, n_latent), for an encoder that sees it; None encodes every cell as an
            unperturbed one, so that its condition has no say.
        """
        if self.sees_shift:
            blank = x.new_zeros(len(x), self.architecture.n_latent)
            x = torch.cat([x, blank if shift is None else shift], dim=1)
        mean, raw = self.head(self.encoder(x)).to(x.dtype).chunk(2, dim=1)  # autocast may have multiplied in less
        return mean, F.softplus(raw) + 1e-6

    def decode(self, z: Tensor) -> Tensor:
        """Mean expression (Gaussian), or logarithm of the expected share of counts (NB), (n_cells, n_genes)."""
        out = self.decoder(z)
        return out if self.architecture.likelihood == "gaussian" else F.log_softmax(out, dim=1)

    @property
    def log_noise(self) -> Tensor:
        """Log sd of the Gaussian, or log inverse dispersion of the NB, of each gene (n_genes,)."""
        if self.architecture.likelihood == "gaussian":
            return self.log_dispersion.clamp(min=LOG_SD_FLOOR)
        return self.log_dispersion

    def reconstruction(self, batch: ShiftBatch, decoded: Tensor) -> Tensor:
        """Negative log-likelihood, summed over genes and averaged over cells; of the Gaussian up to a constant."""
        if self.architecture.likelihood == "gaussian":
            return gaussian_loss(batch.x, decoded, self.log_noise, "sum")
        assert batch.counts is not None
        return nb_loss(batch.counts, decoded + torch.log(batch.counts.size).unsqueeze(1), self.log_noise, "sum")

    def mean_shift(self, condition: Tensor) -> Tensor:
        """Expected shift under multi-hot conditions, `Σ_g q(m_g = 1) E[e_g]`, (n_conditions, n_latent)."""
        return condition @ (torch.sigmoid(self.logit) * self.shift)

    @abstractmethod
    def loss(self, batch: ShiftBatch, random: Random, *, weight: float, n_cells: int) -> SparseShiftTerms:
        """All terms of the loss of a batch; both divergences count `weight`, and the global one `1 / n_cells`."""

    @abstractmethod
    def draw_shift(self, genes: list[int], n: int, random: Random) -> Tensor:
        """Posterior draws of the total shift of a combination of perturbed genes (n, n_latent)."""

    def _terms(self, reconstruction: Tensor, latent: Tensor, global_: Tensor, weight: float) -> SparseShiftTerms:
        return SparseShiftTerms(reconstruction + weight * (latent + global_), reconstruction, latent, global_)


class SAMSArchitecture(SparseShiftArchitecture):
    """Options of SAMS-VAE."""

    mask_prior: float = Field(0.01, gt=0, lt=1)
    """Prior probability that a perturbation shifts a latent (published: 0.01). Raise it where effects are broad."""
    shift_prior_sd: float = Field(1.0, gt=0)
    """Prior sd of the shifts (published: 1)."""
    posterior: Literal["correlated", "mean_field"] = "correlated"
    """`correlated`: the encoder sees the drawn shift beside the cell, and a shift that is masked off is at its prior.
    `mean_field`: neither. Both published."""


class SAMSModule(SparseShiftModule):
    """`z = z_basal + Σ_t m_t ⊙ e_t`, `z_basal ~ N(0, I)`, `e_t ~ N(0, s²)`, `m_t ~ Bernoulli(p)`."""

    def __init__(self, n_genes: int, n_perturbed: int, architecture: SAMSArchitecture) -> None:
        super().__init__(n_genes, n_perturbed, architecture, sees_shift=architecture.posterior == "correlated")
        self.options = architecture
        self._raw_sd = nn.Parameter(torch.full((n_perturbed, architecture.n_latent), math.log(math.expm1(START_SD))))

    @property
    def shift_sd(self) -> Tensor:
        """Posterior sd of the shifts where the mask is on (n_perturbed, n_latent)."""
        return F.softplus(self._raw_sd) + 1e-6

    def loss(self, batch: ShiftBatch, random: Random, *, weight: float, n_cells: int) -> SparseShiftTerms:
        """Negative ELBO per cell, with masks and shifts drawn anew for every cell rather than once for all.

        Each cell's expected log-likelihood depends on the marginals of its own masks only, so the estimate is as
        unbiased as with shared draws, and less noisy.
        """
        shift = self._draw(batch.pair_gene, random)
        total = torch.zeros(len(batch.x), shift.shape[1], dtype=shift.dtype, device=shift.device)
        total = total.index_add(0, batch.pair_cell, shift)
        mean, variance = self.encode(batch.x, total)
        z = mean + variance.sqrt() * _normal_like(mean, random) + total
        reconstruction = self.reconstruction(batch, self.decode(z))
        return self._terms(reconstruction, kl_diagonal(mean, variance).mean(), self.kl_global() / n_cells, weight)

    def kl_global(self) -> Tensor:
        """Divergence of the posterior of all masks and shifts from the prior, in nats.

        `Σ KL(q(m) ‖ p(m)) + w KL(q(e) ‖ p(e))`, where w is q(m = 1) for the correlated posterior, whose shift is at its
        prior where the mask is off, and 1 for the mean field.
        """
        probability = torch.sigmoid(self.logit)
        shift = kl_normal(self.shift, self.shift_sd, self.options.shift_prior_sd)
        if self.options.posterior == "correlated":
            shift = probability * shift
        return (kl_bernoulli(self.logit, self.options.mask_prior) + shift).sum()

    def draw_shift(self, genes: list[int], n: int, random: Random) -> Tensor:
        """Posterior draws of the total shift of a combination of perturbed genes (n, n_latent)."""
        index = torch.tensor(genes, dtype=torch.long).repeat(n)
        return self._draw(index, random).view(n, len(genes), self.options.n_latent).sum(1)

    def _draw(self, gene: Tensor, random: Random) -> Tensor:
        mean, sd, logit = self.shift[gene], self.shift_sd[gene], self.logit[gene]
        return draw_masks(logit, random) * (mean + sd * _normal_like(mean, random))


class SVAEPlusArchitecture(SparseShiftArchitecture):
    """Options of sVAE+."""

    mask_beta: float = Field(2.0, ge=1)
    """Second concentration K of the masks' prior `π ~ Beta(1, K)` (SAMS-VAE's comparison: 2). Raise it for sparser
    shifts."""
    mask_start: float = 0.0
    """Logit of the masks before training (0 in SAMS-VAE's comparison, 5 in sVAE+'s own code)."""


class SVAEPlusModule(SparseShiftModule):
    """`z ~ N(Σ_t m_t ⊙ μ_t, I)`, `m_t ~ Bernoulli(π_t)`, `π_t ~ Beta(1, K)`; the encoder sees the cell alone."""

    def __init__(self, n_genes: int, n_perturbed: int, architecture: SVAEPlusArchitecture) -> None:
        super().__init__(n_genes, n_perturbed, architecture, logit=architecture.mask_start)
        self.options = architecture
        # at exactly 0 a shift and its mask would have no gradient but noise
        nn.init.normal_(self._shift, std=0.1 / GAIN)

    def loss(self, batch: ShiftBatch, random: Random, *, weight: float, n_cells: int) -> SparseShiftTerms:
        """Negative ELBO per cell, with the masks summed out and π at its most probable value."""
        mean, variance = self.encode(batch.x)
        decoded = self.decode(mean + variance.sqrt() * _normal_like(mean, random))
        with torch.autocast(
            mean.device.type, enabled=False
        ):  # the shifts are sums of few terms, the divergence squares
            latent = self.kl_latent(mean, variance, batch.conditions, batch.condition).mean()
        return self._terms(self.reconstruction(batch, decoded), latent, self.global_penalty() / n_cells, weight)

    def kl_latent(self, mean: Tensor, variance: Tensor, conditions: Tensor, condition: Tensor) -> Tensor:
        """Expectation over the masks of `KL(q(z | x) ‖ N(Σ m ⊙ μ, I))`, in nats (n_cells,).

        q(z | x) does not depend on the masks and the divergence is quadratic in them, so that with `s = Σ π μ` and
        `v = Σ π (1 − π) μ²` it is `½ Σ variance + (mean − s)² + v − 1 − log variance`: exact, where the published code
        draws masks.
        """
        probability = torch.sigmoid(self.logit)
        shift = self.mean_shift(conditions)
        spread = 0.5 * (conditions @ (probability * (1 - probability) * self.shift.square())).sum(1)
        return kl_diagonal(mean - shift[condition], variance) + spread[condition]

    def global_penalty(self) -> Tensor:
        """`−Σ log Beta(π; 1, K)` up to its constant: `−(K − 1) Σ log(1 − π)`, in nats.

        q(π) is a point mass and q(m | π) the prior, whose divergences are this and none.
        """
        return (self.options.mask_beta - 1) * F.softplus(self.logit).sum()

    def draw_shift(self, genes: list[int], n: int, random: Random) -> Tensor:
        """Posterior draws of the total shift of a combination of perturbed genes (n, n_latent)."""
        index = torch.tensor(genes, dtype=torch.long).repeat(n)
        drawn = draw_masks(self.logit[index], random) * self.shift[index]
        return drawn.view(n, len(genes), self.options.n_latent).sum(1)


def _normal_like(like: Tensor, random: Random) -> Tensor:
    options: dict[str, Any] = {"generator": random.torch, "device": like.device, "dtype": like.dtype}
    return torch.randn(like.shape, **options)
