"""A world in which the theory of PerturbedVAE holds: its SCM behind an injective mixing, with the truth kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.linalg import solve_triangular

from perturbed.interpret.identifiability_spec import LatentWorldOptions

PARAMETERS, MOMENTS, TRAIN, TEST = range(4)
SLOPE = 0.2
"""Slope of the mixing's LeakyReLU on the negative side."""
N_MOMENTS = 500
"""Cells of each environment from which the scale of the latents is taken."""


@dataclass(frozen=True)
class LatentCells:
    """Cells with control partners and their true latents; row i of each array belongs to cell i."""

    x: np.ndarray
    """(n_cells, n_genes)."""
    x_control: np.ndarray
    """The partners' x, same shape."""
    environment: np.ndarray
    """(n_cells,), 0 is control."""
    z_nu: np.ndarray
    """(n_cells, d_nu)."""
    z_iota: np.ndarray
    """(n_cells, d_iota)."""
    z_iota_control: np.ndarray
    """The partners' z_ι; equal to `z_iota` where background noise is shared."""


class LatentWorld:
    """The linear-Gaussian SCM of PerturbedVAE with other mechanisms in every environment, mixed into genes.

    `z_ι = Λ_ιι z_ι + n_ι` and `z_ν = Λ_νι(u) z_ι + Λ_νν(u) z_ν + n_ν`, with weights from ±U(0.5, 1), means from
    U(−2, 2) and variances from U(0.5, 2), drawn for every environment; which edges exist is the same in all. The
    mixing is an MLP with LeakyReLU whose weights have orthonormal columns (condition number 1), so that it is
    injective; it takes latents scaled to mean 0 and variance 1 over all environments.

    Parameters
    ----------
    options
        The world's options.
    seed
        Of parameters and cells.
    """

    def __init__(self, options: LatentWorldOptions, seed: int) -> None:
        o = options
        self.options, self.seed = options, seed
        rng = np.random.default_rng([seed, PARAMETERS])
        below = np.tril(np.ones((o.d_iota, o.d_iota)), -1)
        self.lambda_ii = _weights(rng, (o.d_iota, o.d_iota)) * below * (rng.random(below.shape) < o.edge_density)
        self.mu_iota = rng.uniform(-2, 2, o.d_iota)
        self.beta_iota = rng.uniform(0.5, 2, o.d_iota)
        self.graph = np.tril(rng.random((o.d_nu, o.d_nu)) < o.edge_density, -1)
        n = o.n_environments
        self.lambda_nn = _weights(rng, (n, o.d_nu, o.d_nu)) * self.graph
        self.lambda_ni = _weights(rng, (n, o.d_nu, o.d_iota))
        self.mu_nu = rng.uniform(-2, 2, (n, o.d_nu))
        self.beta_nu = rng.uniform(0.5, 2, (n, o.d_nu))
        self.orphan = np.arange(n) % o.d_nu if o.parents_removed else np.full(n, -1)
        for environment, latent in enumerate(self.orphan):
            if latent >= 0:
                self.lambda_nn[environment, latent] = 0
                self.lambda_ni[environment, latent] = 0
        self._layers = self._draw_mixing(rng)
        every = np.repeat(np.arange(n), N_MOMENTS)
        rng = np.random.default_rng([seed, MOMENTS])
        z_iota = self._draw_iota(rng, len(every))
        z = np.hstack([z_iota, self._draw_nu(rng, every, z_iota)])
        self._centre, self._scale = z.mean(0), z.std(0)

    def _draw_mixing(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        o = self.options
        widths = [o.d_iota + o.d_nu, *[o.mixing_width] * (o.n_layers - 1), o.n_genes]
        layers = []
        for n_in, n_out in pairwise(widths):
            columns = np.linalg.qr(rng.normal(size=(n_out, n_in)))[0]
            layers.append((columns * np.sqrt(n_out / n_in), 0.3 * rng.normal(size=n_out)))
        return layers

    def mix(self, z_iota: np.ndarray, z_nu: np.ndarray) -> np.ndarray:
        """`x = g(z)` without noise (n_cells, n_genes)."""
        h = (np.hstack([z_iota, z_nu]) - self._centre) / self._scale
        for i, (weight, bias) in enumerate(self._layers):
            h = h @ weight.T + bias
            if i < len(self._layers) - 1:
                h = np.where(h > 0, h, SLOPE * h)
        return h

    def _draw_iota(self, rng: np.random.Generator, n: int) -> np.ndarray:
        noise = self.mu_iota + np.sqrt(self.beta_iota) * rng.normal(size=(n, self.options.d_iota))
        a = np.eye(self.options.d_iota) - self.lambda_ii
        return np.ascontiguousarray(solve_triangular(a, noise.T, lower=True, unit_diagonal=True).T)

    def _draw_nu(self, rng: np.random.Generator, environment: np.ndarray, z_iota: np.ndarray) -> np.ndarray:
        d_nu = self.options.d_nu
        noise = rng.normal(size=(len(environment), d_nu))
        z_nu = np.empty((len(environment), d_nu))
        for e in np.unique(environment):
            rows = environment == e
            right = z_iota[rows] @ self.lambda_ni[e].T + self.mu_nu[e] + np.sqrt(self.beta_nu[e]) * noise[rows]
            a = np.eye(d_nu) - self.lambda_nn[e]
            z_nu[rows] = solve_triangular(a, right.T, lower=True, unit_diagonal=True).T
        return z_nu

    def draw(self, stream: int, n: int) -> LatentCells:
        """Cells in equal numbers from all environments, with their control partners.

        Parameters
        ----------
        stream
            `TRAIN` or `TEST`; cells of different streams are independent.
        n
            How many.
        """
        rng = np.random.default_rng([self.seed, stream])
        environment = np.arange(n) % self.options.n_environments
        z_iota = self._draw_iota(rng, n)
        z_nu = self._draw_nu(rng, environment, z_iota)
        z_iota_control = z_iota if self.options.shared_noise else self._draw_iota(rng, n)
        z_nu_control = self._draw_nu(rng, np.zeros(n, dtype=int), z_iota_control)
        x, x_control = self.mix(z_iota, z_nu), self.mix(z_iota_control, z_nu_control)
        if self.options.noise:
            x = x + self.options.noise * rng.normal(size=x.shape)
            x_control = x_control + self.options.noise * rng.normal(size=x.shape)
        return LatentCells(x, x_control, environment, z_nu, z_iota, z_iota_control)


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.0, shape)
