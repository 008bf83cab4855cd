"""A linear-Gaussian structural causal model of response latents, whose mechanisms depend on the perturbation.

`z_ν = Λ_νν(u) z_ν + Λ_νι(u) z_ι + μ(u) + ε,  ε ~ N(0, diag β(u))` with a strictly lower-triangular `Λ_νν(u)`: the
order of the latents is the causal order, the same under every condition `u`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from perturbed.models.nn.mlp import Activation, build_mlp

ConditionMap = Literal["linear", "mlp"]

SHIFT_GAIN, EDGE_GAIN = 10.0, 0.1
"""Factors between parameters and mechanisms.

Adam moves every parameter by about its learning rate a step, however small the gradient: μ, which must travel far on
the few cells of one condition, is sped up, and edges, of which there are thousands per condition with hardly a
gradient, are kept from wandering.
"""


class Mechanisms(NamedTuple):
    """The structural equations under some conditions."""

    edges: Tensor
    """`Λ_νν` among responses, strictly lower-triangular (n_conditions, n_nu, n_nu)."""
    inputs: Tensor
    """`Λ_νι` from the background (n_conditions, n_nu, n_iota)."""
    shift: Tensor
    """`μ` (n_conditions, n_nu)."""
    log_variance: Tensor
    """`log β` of the noise (n_conditions, n_nu)."""
    edge_shift: Tensor
    """What the condition changes in the entries of `Λ_νν` and `Λ_νι` (n_conditions, n_edges)."""


def fill_strictly_lower(values: Tensor, n: int) -> Tensor:
    """Strictly lower-triangular matrices from their entries, row by row.

    Parameters
    ----------
    values
        Entries (n_conditions, n (n − 1) / 2).
    n
        Number of rows.

    Returns
    -------
    Tensor
        (n_conditions, n, n); zero on and above the diagonal.
    """
    row, column = torch.tril_indices(n, n, offset=-1, device=values.device)
    flat = values.new_zeros(len(values), n * n)
    return flat.index_copy(1, row * n + column, values).view(len(values), n, n)


def solve_structural(edges: Tensor, right: Tensor) -> Tensor:
    """Solve `z = Λ z + r` for z, that is `z = (I − Λ)⁻¹ r`, by forward substitution.

    Parameters
    ----------
    edges
        Strictly lower-triangular `Λ` (n_conditions, n, n).
    right
        `r`, any number of columns (n_conditions, n, n_columns).

    Returns
    -------
    Tensor
        z, shaped as `right`.
    """
    # unitriangular: the diagonal is taken as 1, so that −Λ itself may be handed over
    return torch.linalg.solve_triangular(-edges, right, upper=False, unitriangular=True)


def kl_diagonal(mean: Tensor, variance: Tensor, prior_log_variance: Tensor | None = None) -> Tensor:
    """Kullback–Leibler divergence `KL(N(mean, diag variance) ‖ N(0, diag prior))`, summed over latents.

    `½ Σ (variance + mean²) / prior − 1 − log(variance / prior)`.

    Parameters
    ----------
    mean, variance
        Posterior (n_cells, n_latent).
    prior_log_variance
        Logarithm of the prior's variances, same shape; None is the standard normal.

    Returns
    -------
    Tensor
        (n_cells,), in nats.
    """
    second_moment = variance + mean.square()
    if prior_log_variance is None:
        return 0.5 * (second_moment - 1 - torch.log(variance)).sum(-1)
    ratio = second_moment * torch.exp(-prior_log_variance)
    return 0.5 * (ratio - 1 - torch.log(variance) + prior_log_variance).sum(-1)


class AutoregressiveNoise(NamedTuple):
    """A Gaussian over the SCM's noise ε, each latent given the cell, the condition and the latents before it.

    `ε_i = m_i + Σ_{j<i} C_ij (ε_j − m_j) + s_i e_i`, `e ~ N(0, I)`. Its covariance is
    `(I − C)⁻¹ diag(s²) (I − C)⁻ᵀ` with determinant `Π s_i²`, for `I − C` is unit triangular.
    """

    mean: Tensor
    """`m` (n_cells, n_nu)."""
    variance: Tensor
    """`s²`, of each latent given those before it (n_cells, n_nu)."""
    regression: Tensor
    """`C`, strictly lower-triangular (n_cells, n_nu, n_nu)."""

    def sample(self, draws: Tensor) -> Tensor:
        """Reparameterised samples from standard normal `draws` (n_cells, n_nu)."""
        return self.mean + solve_structural(self.regression, (self.variance.sqrt() * draws).unsqueeze(2)).squeeze(2)

    def log_density(self, noise: Tensor) -> Tensor:
        """`Σ_i log N(ε_i; m_i + Σ_j C_ij (ε_j − m_j), s_i²)` of `noise` (n_cells, n_nu), giving (n_cells,)."""
        centred = noise - self.mean
        residual = centred - torch.bmm(self.regression, centred.unsqueeze(2)).squeeze(2)
        return -0.5 * (residual.square() / self.variance + torch.log(2 * math.pi * self.variance)).sum(-1)

    def kl(self, prior_log_variance: Tensor) -> Tensor:
        """`KL(q(ε) ‖ N(0, diag β))` in closed form (n_cells,), in nats.

        `½ Σ_i (Σ_ii + m_i²) / β_i − 1 − log(s_i² / β_i)`, where the marginal variances `Σ_ii` are the squared row
        norms of `(I − C)⁻¹ diag(s)`.
        """
        scale = solve_structural(self.regression, torch.diag_embed(self.variance.sqrt()))
        second_moment = scale.square().sum(2) + self.mean.square()
        ratio = second_moment * torch.exp(-prior_log_variance)
        return 0.5 * (ratio - 1 - torch.log(self.variance) + prior_log_variance).sum(-1)


class ResponseSCM(nn.Module):
    """Mechanisms of the response latents as a function of the multi-hot condition.

    Each of `Λ_νν, Λ_νι, log β` is a base value (the control's) plus a shift that is zero at `u = 0`; `μ` has no base,
    since the origin of `z_ν` is arbitrary. With the linear map the shift of a combination is the sum of the shifts of
    its genes; with the MLP it is `f(u) − f(0)`. Edges and shifts start at zero.

    Parameters
    ----------
    n_perturbed
        Length of u.
    n_nu, n_iota
        Latent dimensions.
    condition_map
        `linear` or `mlp`.
    hidden
        Width of the MLP's hidden layer.
    learn_variance
        Whether `β(u)` is learned; otherwise it is 1.
    """

    def __init__(
        self,
        n_perturbed: int,
        n_nu: int,
        n_iota: int,
        *,
        condition_map: ConditionMap = "linear",
        hidden: int = 256,
        activation: Activation = "leaky_relu",
        learn_variance: bool = True,
    ) -> None:
        super().__init__()
        self.n_nu, self.n_iota, self.learn_variance = n_nu, n_iota, learn_variance
        self.sizes = (n_nu * (n_nu - 1) // 2, n_nu * n_iota, n_nu, n_nu)
        n_out = sum(self.sizes)
        self.linear = nn.Linear(n_perturbed, n_out, bias=False) if condition_map == "linear" else None
        self.mlp = build_mlp((n_perturbed, hidden, n_out), activation) if condition_map == "mlp" else None
        for parameter in (self.mlp[-1] if self.mlp is not None else self).parameters():
            nn.init.zeros_(parameter)
        self.base = nn.Parameter(torch.zeros(self.sizes[0] + self.sizes[1]))

    def forward(self, conditions: Tensor) -> Mechanisms:
        """Mechanisms under `conditions` (n_conditions, n_perturbed), rows of zeros and ones."""
        n_edges = self.sizes[0] + self.sizes[1]
        edge_shift, mu, log_variance = self._shift(conditions).split((n_edges, self.n_nu, self.n_nu), dim=1)
        edge_shift = EDGE_GAIN * edge_shift
        edges, inputs = (self.base + edge_shift).split(self.sizes[:2], dim=1)
        return Mechanisms(
            fill_strictly_lower(edges, self.n_nu),
            inputs.view(-1, self.n_nu, self.n_iota),
            SHIFT_GAIN * mu,
            log_variance if self.learn_variance else torch.zeros_like(log_variance),
            edge_shift,
        )

    def _shift(self, conditions: Tensor) -> Tensor:
        if self.linear is not None:
            return self.linear(conditions).to(conditions.dtype)  # autocast may have multiplied in less
        assert self.mlp is not None
        return self.mlp(conditions) - self.mlp(torch.zeros_like(conditions[:1]))

    def respond(self, mechanisms: Mechanisms, condition: Tensor, z_iota: Tensor, noise: Tensor) -> Tensor:
        """Response latents of cells: `z_ν = (I − Λ_νν)⁻¹ (noise + Λ_νι z_ι + μ)`.

        Parameters
        ----------
        mechanisms
            Of the distinct conditions.
        condition
            Row of `mechanisms` for each cell (n_cells,).
        z_iota
            Background (n_cells, n_iota).
        noise
            `ε` (n_cells, n_nu); zero gives the prior mean of `z_ν` given `z_ι`.
        """
        # autocast would multiply in bfloat16, and triangular solves exist in full precision only
        inputs = torch.bmm(mechanisms.inputs[condition], z_iota.unsqueeze(2)).squeeze(2).to(noise.dtype)
        right = noise + inputs + mechanisms.shift[condition]
        return solve_structural(mechanisms.edges[condition], right.unsqueeze(2)).squeeze(2)
