"""The network of PerturbedVAE: encoder, response SCM, decoder and the terms of its loss."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perturbed.config import Section
from perturbed.models.cells import Batch
from perturbed.models.nn.likelihoods import Reduction, gaussian_loss, nb_loss
from perturbed.models.nn.mlp import Activation, build_mlp
from perturbed.models.nn.mmd import gaussian_mmd, multiscale_bandwidths
from perturbed.models.nn.scm import (
    AutoregressiveNoise,
    ConditionMap,
    Mechanisms,
    ResponseSCM,
    fill_strictly_lower,
    kl_diagonal,
)

ACTIVE_VARIANCE = 0.01
"""A latent is active where its posterior mean varies over cells by more than this (Burda et al. 2016)."""


class Architecture(Section):
    """Shape of the network. Everything the paper leaves open is an option here."""

    n_nu: int = Field(20, ge=1)
    """Responsive latents z_ν (paper: 20 of 105)."""
    n_iota: int = Field(85, ge=1)
    """Background latents z_ι (paper: 85 of 105). The paper finds fewer responsive than background latents best."""
    n_hidden: int = Field(256, ge=1)
    """Width of every hidden layer (paper: 256)."""
    n_hidden_layers: int = Field(1, ge=1)
    """Hidden layers of the encoder and of the decoder. Deepen for many cells."""
    activation: Activation = "leaky_relu"
    """Activation of the hidden layers."""
    condition_map: ConditionMap = "linear"
    """How Λ(u), μ(u), β(u) depend on the condition: `linear` adds the shifts of a combination's genes, `mlp` learns how
    they combine, which needs combinations in training."""
    response_posterior: Literal["diagonal", "autoregressive"] = "diagonal"
    """Posterior of the responsive noise ε given cell and condition. `diagonal`: independent latents, so that z_ν
    inherits its dependence from the SCM. `autoregressive`: each ε_i also regresses on those before it in causal order,
    with coefficients of the cell and the condition; costs n_nu (n_nu − 1) / 2 more outputs of the encoder."""
    learn_variance: bool = True
    """Learn the SCM's noise β(u); `false` fixes it at 1."""
    likelihood: Literal["gaussian", "nb"] = "gaussian"
    """`gaussian` on log-normalised expression; `nb` on counts, where the data hold them."""
    learn_noise: bool = False
    """Gaussian only: learn each gene's observation noise. Off, the loss is the squared error, as in the predecessor."""
    reconstruction_reduction: Reduction = "mean"
    """Reconstruction loss as mean or sum over genes. With `sum` the latents carry far more, since the KL weights count
    for that much less."""


class Posterior(NamedTuple):
    """What the encoder says of cells."""

    noise_mean: Tensor
    """Mean of the responsive noise given (x, u) (n_cells, n_nu)."""
    noise_variance: Tensor
    """Its variance, same shape."""
    iota_mean: Tensor
    """Mean of z_ι given x, of cells and partners (2 n_cells, n_iota)."""
    iota_variance: Tensor
    """Its variance, same shape."""
    noise_regression: Tensor | None = None
    """Of the autoregressive posterior: what each noise regresses on, strictly lower-triangular (n_cells, n_nu, n_nu);
    `noise_variance` is then the one given the latents before."""

    def sample_noise(self, draws: Tensor) -> Tensor:
        """Reparameterised samples of ε (n_cells, n_nu)."""
        if self.noise_regression is None:
            return self.noise_mean + self.noise_variance.sqrt() * draws
        return AutoregressiveNoise(self.noise_mean, self.noise_variance, self.noise_regression).sample(draws)

    def kl_noise(self, prior_log_variance: Tensor) -> Tensor:
        """`KL(q(ε | x, u) ‖ N(0, diag β(u)))` (n_cells,), closed in both forms."""
        if self.noise_regression is None:
            return kl_diagonal(self.noise_mean, self.noise_variance, prior_log_variance)
        return AutoregressiveNoise(self.noise_mean, self.noise_variance, self.noise_regression).kl(prior_log_variance)


class Draws(NamedTuple):
    """Standard normal draws of the reparameterisation."""

    nu: Tensor
    """(n_cells, n_nu)."""
    iota: Tensor
    """(n_cells, n_iota)."""
    prior_nu: Tensor | None = None
    """For the MMD: responsive noise from the prior (n_cells, n_nu)."""
    partner_iota: Tensor | None = None
    """For the MMD: background of the partners (n_cells, n_iota)."""


class Generated(NamedTuple):
    """What the generative half makes of sampled latents."""

    z_nu: Tensor
    """(n_cells, n_nu)."""
    z_iota: Tensor
    """(n_cells, n_iota)."""
    decoded: Tensor
    """Mean expression (Gaussian) or logarithm of the expected share of counts (NB), (n_cells, n_genes)."""


class LossTerms(NamedTuple):
    """Every term of the loss, averaged over cells; only the first is minimised."""

    loss: Tensor
    reconstruction: Tensor
    kl_nu: Tensor
    kl_iota: Tensor
    alignment: Tensor
    edges: Tensor
    mmd: Tensor
    active_iota: Tensor
    """Background latents whose posterior mean varies over the batch's cells by more than `ACTIVE_VARIANCE`; 0 of them
    is a collapsed z_ι, which aligns perfectly and says nothing."""


class PerturbedVAEModule(nn.Module):
    """Encoder, linear-Gaussian response SCM and decoder.

    The posterior is placed on the SCM's noise ε rather than on z_ν itself. Given z_ι and u, z_ν is an affine image of
    ε with unit Jacobian (Λ_νν is strictly lower-triangular), so
    `KL(q(z_ν|x,u,z_ι) ‖ p(z_ν|u,z_ι)) = KL(q(ε|x,u) ‖ N(0, diag β(u)))`, which is closed and free of triangular
    solves; q(z_ν) is the autoregressive Gaussian in causal order that the paper describes, with the prior's own edges
    (`diagonal`) or with edges of its own beside them (`autoregressive`).

    Parameters
    ----------
    n_genes, n_perturbed
        Width of the expression and of the condition vector.
    architecture
        The options.
    """

    def __init__(self, n_genes: int, n_perturbed: int, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        hidden = [a.n_hidden] * a.n_hidden_layers
        self.encoder = build_mlp((n_genes, *hidden), a.activation, last=True)
        self.iota_head = nn.Linear(a.n_hidden, 2 * a.n_iota)
        self.nu_head = nn.Linear(a.n_hidden, 2 * a.n_nu)
        # the condition's part of the linear head on [h, u], computed once per distinct condition
        self.nu_head_condition = nn.Linear(n_perturbed, 2 * a.n_nu, bias=False)
        self.regression_head = self._regression_head(n_perturbed)
        self.scm = ResponseSCM(
            n_perturbed,
            a.n_nu,
            a.n_iota,
            condition_map=a.condition_map,
            hidden=a.n_hidden,
            activation=a.activation,
            learn_variance=a.learn_variance,
        )
        self.decoder = build_mlp((a.n_nu + a.n_iota, *hidden, n_genes), a.activation)
        per_gene = a.likelihood == "nb" or a.learn_noise
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if per_gene else None

    def _regression_head(self, n_perturbed: int) -> nn.ModuleList | None:
        """From encoder output and from condition to the posterior's regression; zero, so that it starts diagonal."""
        a = self.architecture
        if a.response_posterior == "diagonal":
            return None
        n_out = a.n_nu * (a.n_nu - 1) // 2
        heads = nn.ModuleList([nn.Linear(a.n_hidden, n_out, bias=False), nn.Linear(n_perturbed, n_out, bias=False)])
        for parameter in heads.parameters():
            nn.init.zeros_(parameter)
        return heads

    @torch.no_grad()
    def start_at(self, centre: Tensor, output: Tensor) -> None:
        """Begin where the data are: the encoder sees `x − centre`, the decoder's bias is `output` (n_genes,)."""
        first, last = self.encoder[0], self.decoder[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        first.bias.sub_(first.weight @ centre)
        last.bias.copy_(output)

    def encode_background(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of z_ι from the encoder's output; the condition is not seen."""
        mean, raw = self.iota_head(h).to(h.dtype).chunk(2, dim=1)  # autocast may have multiplied in less
        return mean, F.softplus(raw) + 1e-6

    def inference(self, x: Tensor, conditions: Tensor, condition: Tensor) -> Posterior:
        """Encode cells and their partners in one pass.

        Parameters
        ----------
        x
            (2 n_cells, n_genes), cells first; partners only inform z_ι. (n_cells, n_genes) without partners.
        conditions, condition
            As in `Batch`.
        """
        h = self.encoder(x)
        own = h[: len(condition)]
        nu = self.nu_head(own) + self.nu_head_condition(conditions)[condition]
        noise_mean, raw = nu.to(h.dtype).chunk(2, dim=1)
        regression = None
        if self.regression_head is not None:
            of_cell, of_condition = self.regression_head
            entries = (of_cell(own) + of_condition(conditions)[condition]).to(h.dtype)
            regression = fill_strictly_lower(entries, self.architecture.n_nu)
        return Posterior(noise_mean, F.softplus(raw) + 1e-6, *self.encode_background(h), regression)

    def generative(self, mechanisms: Mechanisms, condition: Tensor, z_iota: Tensor, noise: Tensor) -> Generated:
        """Respond to the condition and decode; the decoder sees the latents only.

        Parameters
        ----------
        mechanisms, condition
            Of the distinct conditions, and the row of each cell.
        z_iota, noise
            (n_cells, n_iota), (n_cells, n_nu).
        """
        z_nu = self.scm.respond(mechanisms, condition, z_iota, noise)
        return Generated(z_nu, z_iota, self.decode(z_nu, z_iota))

    def decode(self, z_nu: Tensor, z_iota: Tensor) -> Tensor:
        """Expression from latents: the mean (Gaussian), or the logarithm of the share of counts (NB)."""
        out = self.decoder(torch.cat([z_nu, z_iota], dim=1))
        return out if self.architecture.likelihood == "gaussian" else F.log_softmax(out, dim=1)

    def loss(
        self,
        batch: Batch,
        draws: Draws,
        *,
        kl_weight_nu: float,
        kl_weight_iota: float,
        alpha: float,
        edge_penalty: float = 0.0,
        mmd_weight: float = 0.0,
        mmd_width: float = 1000.0,
    ) -> LossTerms:
        """All terms of the loss of a batch.

        `reconstruction + kl_weight_nu KL_ν + kl_weight_iota (KL_ι of cells + KL_ι of partners) + alpha alignment
        + edge_penalty edges + mmd_weight MMD`, where the alignment is `‖μ_ι(x) − μ_ι(x_control)‖²`, averaged over the
        perturbed cells, `edges` is the L1 norm of what the condition changes in Λ_νν and Λ_νι, averaged over cells, and
        the MMD compares generated with observed cells of each condition (`compare_generated`).
        """
        n = len(batch.condition)
        posterior = self.inference(batch.x, batch.conditions, batch.condition)
        mechanisms = self.scm(batch.conditions)
        noise = posterior.sample_noise(draws.nu)
        z_iota = posterior.iota_mean[:n] + posterior.iota_variance[:n].sqrt() * draws.iota
        decoded = self.generative(mechanisms, batch.condition, z_iota, noise).decoded
        kl_nu = posterior.kl_noise(mechanisms.log_variance[batch.condition]).mean()
        kl_iota = kl_diagonal(posterior.iota_mean, posterior.iota_variance).sum() / n
        distance = (posterior.iota_mean[:n] - posterior.iota_mean[n:]).square().sum(1)
        perturbed = batch.conditions.any(1)[batch.condition].to(distance.dtype)
        alignment = (distance * perturbed).sum() / torch.clamp(perturbed.sum(), min=1)
        if batch.perturbed_share != 1:
            alignment = alignment * batch.perturbed_share
        reconstruction = self._reconstruction(batch, decoded)
        edges = mechanisms.edge_shift.abs().sum(1)[batch.condition].mean()
        total = reconstruction + kl_weight_nu * kl_nu + kl_weight_iota * kl_iota + alpha * alignment
        total = total + edge_penalty * edges
        mmd = torch.zeros_like(total)
        if mmd_weight:
            mmd = self.compare_generated(batch, draws, posterior, mechanisms, mmd_width)
            total = total + mmd_weight * mmd
        # the population variance: a batch of one has none, not NaN
        active = (posterior.iota_mean[:n].detach().var(0, correction=0) > ACTIVE_VARIANCE).sum().to(total.dtype)
        return LossTerms(total, reconstruction, kl_nu, kl_iota, alignment, edges, mmd, active)

    def compare_generated(
        self, batch: Batch, draws: Draws, posterior: Posterior, mechanisms: Mechanisms, width: float
    ) -> Tensor:
        """MMD between cells generated as at test time and the observed cells of the same condition.

        Generated: z_ι from the posterior of each cell's control partner, z_ν from the SCM prior under the cell's
        condition, decoded (Gaussian likelihood). Kernels as in the discrepancy-VAE, cells compared within their
        condition.
        """
        assert draws.prior_nu is not None and draws.partner_iota is not None
        n = len(batch.condition)
        z_iota = posterior.iota_mean[n:] + posterior.iota_variance[n:].sqrt() * draws.partner_iota
        noise = torch.exp(0.5 * mechanisms.log_variance[batch.condition]) * draws.prior_nu
        generated = self.generative(mechanisms, batch.condition, z_iota, noise).decoded
        return gaussian_mmd(generated, batch.x[:n], multiscale_bandwidths(width), batch.condition)

    def _reconstruction(self, batch: Batch, decoded: Tensor) -> Tensor:
        reduction = self.architecture.reconstruction_reduction
        if self.architecture.likelihood == "gaussian":
            return gaussian_loss(batch.x[: len(decoded)], decoded, self.log_dispersion, reduction)
        assert batch.counts is not None and self.log_dispersion is not None
        log_mean = decoded + torch.log(batch.counts.size).unsqueeze(1)
        return nb_loss(batch.counts, log_mean, self.log_dispersion, reduction)
