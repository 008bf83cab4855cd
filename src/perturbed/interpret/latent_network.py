"""PerturbedVAE on continuous data with the exact scale of the ELBO, and a plain VAE beside it.

`PerturbedVAEModule` places its posterior on the SCM's noise with a head additive in the condition; where mechanisms
differ freely between environments the noise `A(u) z_ν − Λ_νι(u) z_ι − μ(u)` is no such function. Here, as in the
paper's Eq. 2 and 59, the posterior is on z_ν, and its KL to the SCM's prior is taken in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perturbed.interpret.identifiability_spec import EstimatorOptions
from perturbed.models.nn.likelihoods import gaussian_loss
from perturbed.models.nn.mlp import build_mlp
from perturbed.models.nn.scm import Mechanisms, ResponseSCM, fill_strictly_lower, kl_diagonal


class EnvironmentSCM(ResponseSCM):
    """The response SCM without the gains that slow its edges: here an environment has cells enough for each of them."""

    def forward(self, conditions: Tensor) -> Mechanisms:
        """Mechanisms under one-hot `conditions` (n_environments, n_environments − 1)."""
        n_edges = self.sizes[0] + self.sizes[1]
        edge_shift, mu, log_variance = self._shift(conditions).split((n_edges, self.n_nu, self.n_nu), dim=1)
        edges, inputs = (self.base + edge_shift).split(self.sizes[:2], dim=1)
        return Mechanisms(
            fill_strictly_lower(edges, self.n_nu),
            inputs.view(-1, self.n_nu, self.n_iota),
            mu,
            log_variance,
            edge_shift,
        )


class LatentPosterior(NamedTuple):
    """Diagonal Gaussians of the latents."""

    iota_mean: Tensor
    """(n_cells, d_iota)."""
    iota_variance: Tensor
    """Same shape."""
    nu_mean: Tensor
    """(n_cells, d_nu)."""
    nu_variance: Tensor
    """Same shape."""


class LatentLoss(NamedTuple):
    """Terms of the loss, averaged over cells and partners; only the first is minimised."""

    loss: Tensor
    reconstruction: Tensor
    kl_nu: Tensor
    kl_iota: Tensor
    alignment: Tensor


def kl_response(posterior: LatentPosterior, mechanisms: Mechanisms, environment: Tensor) -> Tensor:
    """`E_q(z_ι) KL(q(z_ν) ‖ p(z_ν | u, z_ι))` in closed form, (n_cells,), in nats.

    With `A = I − Λ_νν`, posterior variances s and t of z_ν and z_ι, and `r = A m_ν − Λ_νι m_ι − μ`, the prior is
    `N(A⁻¹(Λ_νι z_ι + μ), A⁻¹ diag(β) A⁻ᵀ)` with unit determinant of A, so that the divergence is
    `½ Σ_k (r_k² + Σ_j A_kj² s_j + Σ_j Λ_νι,kj² t_j) / β_k − 1 − log s_k + log β_k`.
    """
    a = torch.eye(mechanisms.edges.shape[1], dtype=mechanisms.edges.dtype, device=mechanisms.edges.device)
    a = (a - mechanisms.edges)[environment]
    inputs = mechanisms.inputs[environment]
    log_beta = mechanisms.log_variance[environment]
    mean = _times(a, posterior.nu_mean) - _times(inputs, posterior.iota_mean) - mechanisms.shift[environment]
    spread = _times(a.square(), posterior.nu_variance) + _times(inputs.square(), posterior.iota_variance)
    ratio = (mean.square() + spread) * torch.exp(-log_beta)
    return 0.5 * (ratio - 1 - torch.log(posterior.nu_variance) + log_beta).sum(1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(matrix, vector.unsqueeze(2)).squeeze(2)


class LatentVAE(nn.Module):
    """Encoder, SCM and decoder; encoder and decoder are a linear map plus an MLP.

    Parameters
    ----------
    n_inputs, n_environments, d_nu, d_iota
        Sizes.
    options
        The estimator's options.
    plain
        A plain VAE: the prior of all latents is one standard normal.
    """

    def __init__(
        self, n_inputs: int, n_environments: int, d_nu: int, d_iota: int, options: EstimatorOptions, plain: bool = False
    ) -> None:
        super().__init__()
        self.d_nu, self.d_iota, self.plain = d_nu, d_iota, plain
        d, hidden = d_nu + d_iota, [options.n_hidden] * options.n_hidden_layers
        self.encoder = build_mlp((n_inputs, *hidden), last=True)
        self.mean_head, self.variance_head = nn.Linear(options.n_hidden, d), nn.Linear(options.n_hidden, d)
        self.linear_encoder = nn.Linear(n_inputs, d, bias=False)
        self.condition_head = None
        if options.posterior_sees_condition and not plain:
            self.condition_head = nn.Linear(n_environments - 1, 2 * d_nu, bias=False)
            nn.init.zeros_(self.condition_head.weight)
        self.scm = None if plain else EnvironmentSCM(n_environments - 1, d_nu, d_iota)
        self.decoder, self.linear_decoder = build_mlp((d, *hidden, n_inputs)), nn.Linear(d, n_inputs, bias=False)
        self.log_noise = nn.Parameter(torch.full((n_inputs,), -1.0))
        conditions = torch.cat([torch.zeros(1, n_environments - 1), torch.eye(n_environments - 1)])
        self.register_buffer("conditions", conditions, persistent=False)

    @torch.no_grad()
    def start_at(self, encoder: np.ndarray, decoder: np.ndarray) -> None:
        """Begin at a linear model: `z = encoder x`, `x = decoder z`; the MLPs add nothing yet."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        for parameter in (*self.mean_head.parameters(), *last.parameters()):
            nn.init.zeros_(parameter)
        self.linear_encoder.weight.copy_(torch.from_numpy(encoder))
        self.linear_decoder.weight.copy_(torch.from_numpy(decoder))

    def encode(self, x: Tensor, environment: Tensor) -> LatentPosterior:
        """Posterior of cells `x` (n_cells, n_inputs) of the environments (n_cells,)."""
        h = self.encoder(x)
        mean, raw = self.mean_head(h) + self.linear_encoder(x), self.variance_head(h) - 2  # begin with precise latents
        iota_mean, nu_mean = mean.split((self.d_iota, self.d_nu), dim=1)
        iota_raw, nu_raw = raw.split((self.d_iota, self.d_nu), dim=1)
        if self.condition_head is not None:
            shift, scale = self.condition_head(self.conditions)[environment].chunk(2, dim=1)
            nu_mean, nu_raw = nu_mean + shift, nu_raw + scale
        return LatentPosterior(iota_mean, F.softplus(iota_raw) + 1e-6, nu_mean, F.softplus(nu_raw) + 1e-6)

    def loss(
        self, x: Tensor, environment: Tensor, draws: Tensor, *, n_cells: int, kl_weight: float, alpha: float
    ) -> LatentLoss:
        """Negative ELBO, averaged over all rows, and `alpha ‖μ_ι(x) − μ_ι(x_control)‖²` over the perturbed cells.

        Parameters
        ----------
        x, environment
            `n_cells` cells and behind them their partners, which are control cells.
        draws
            Standard normal (rows of x, d_iota + d_nu).
        """
        q = self.encode(x, environment)
        sd = torch.cat([q.iota_variance, q.nu_variance], dim=1).sqrt()
        z = torch.cat([q.iota_mean, q.nu_mean], dim=1) + sd * draws
        decoded = self.decoder(z) + self.linear_decoder(z)
        reconstruction = gaussian_loss(x, decoded, self.log_noise, "sum")
        kl_iota = kl_diagonal(q.iota_mean, q.iota_variance).mean()
        if self.scm is None:
            kl_nu = kl_diagonal(q.nu_mean, q.nu_variance).mean()
        else:
            kl_nu = kl_response(q, self.scm(self.conditions), environment).mean()
        distance = (q.iota_mean[:n_cells] - q.iota_mean[n_cells:]).square().sum(1)
        perturbed = (environment[:n_cells] > 0).to(x.dtype)
        alignment = (distance * perturbed).sum() / torch.clamp(perturbed.sum(), min=1)
        total = reconstruction + kl_weight * (kl_nu + kl_iota) + kl_weight * alpha * alignment
        return LatentLoss(total, reconstruction, kl_nu, kl_iota, alignment)
