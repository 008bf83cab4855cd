"""Generator `scm`: perturbations shift the mechanisms of a linear-Gaussian SCM over responsive programs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from perturbed.data.simulators.params import ScmParams
from perturbed.data.simulators.world import (
    EFFECTS,
    GRAPH,
    Background,
    Generator,
    Response,
    signed_uniform,
    stream,
)


@dataclass(frozen=True)
class Mechanisms:
    """Parameters of the responsive latents under one condition, or a change of them.

    Parameters
    ----------
    lambda_nn
        Edges among responsive latents (d_nu, d_nu), strictly lower triangular; row = child.
    lambda_ni
        Edges from invariant latents (d_nu, d_iota).
    mu
        Means of the noise (d_nu,).
    log_beta
        Log variances of the noise (d_nu,).
    """

    lambda_nn: np.ndarray
    lambda_ni: np.ndarray
    mu: np.ndarray
    log_beta: np.ndarray

    def __add__(self, change: Mechanisms) -> Mechanisms:
        return Mechanisms(
            self.lambda_nn + change.lambda_nn,
            self.lambda_ni + change.lambda_ni,
            self.mu + change.mu,
            self.log_beta + change.log_beta,
        )

    def solve(self, z_iota: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Responsive latents `(I - Λ_νν)⁻¹ (Λ_νι z_ι + μ + √β ε)` of cells (n_cells, d_nu), by forward substitution."""
        right = z_iota @ self.lambda_ni.T + self.mu + noise * np.exp(0.5 * self.log_beta)
        a = np.eye(len(self.mu)) - self.lambda_nn
        return np.ascontiguousarray(solve_triangular(a, right.T, lower=True, unit_diagonal=True).T)


class Scm(Generator):
    """Structural causal model of PerturbedVAE's own class.

    Control: `z_ν = Λ_νν z_ν + Λ_νι z_ι + n`, `n ~ N(μ, diag β)`. The perturbation of a gene adds its changes to μ,
    log β and to the rows of Λ_νν and Λ_νι of the latents it targets; a double adds the changes of both genes. The
    first latent is a root, shifted by every perturbation (the systematic effect). Each other latent in turn is the
    first target of a gene, and the first gene of each takes all parents from it, so that every latent is once
    without parents (intervention sufficiency, where there are at least `d_nu - 1` perturbed genes).
    """

    def __init__(self, params: ScmParams, seed: int) -> None:
        super().__init__(params, seed)
        self.control = self._draw_control(params, seed)
        self.changes = [self._draw_change(params, seed, i) for i in range(params.n_perturbed_genes)]

    @staticmethod
    def _draw_control(p: ScmParams, seed: int) -> Mechanisms:
        rng = stream(seed, GRAPH)
        low, high = 2 / 3, 4 / 3
        edges = np.tril(rng.random((p.d_nu, p.d_nu)) < p.edge_density, -1)
        weights = signed_uniform(rng, edges.shape, low * p.edge_weight, high * p.edge_weight)
        edges_iota = rng.random((p.d_nu, p.d_iota)) < p.iota_density
        edges_iota[:, -1] = False  # programs follow the cell's state and cycle; depth is technical
        weights_iota = signed_uniform(rng, edges_iota.shape, low * p.iota_weight, high * p.iota_weight)
        log_beta = np.log(p.noise_variance) + rng.uniform(-0.5, 0.5, p.d_nu)
        return Mechanisms(edges * weights, edges_iota * weights_iota, np.zeros(p.d_nu), log_beta)

    def _draw_change(self, p: ScmParams, seed: int, gene: int) -> Mechanisms:
        rng = stream(seed, EFFECTS, gene)
        first = 1 + gene % (p.d_nu - 1)
        others = rng.choice(np.setdiff1d(np.arange(1, p.d_nu), [first]), p.n_targets - 1, replace=False)
        targets = np.concatenate([[first], others])
        mu, log_beta = np.zeros(p.d_nu), np.zeros(p.d_nu)
        mu[0] = p.shared_effect * rng.uniform(0.4, 1.6)
        mu[targets] = signed_uniform(rng, len(targets), 0.5 * p.effect_size, 1.5 * p.effect_size)
        hit = np.concatenate([[0], targets])
        log_beta[hit] = rng.normal(0.0, p.log_variance_change, len(hit))
        nn, ni = np.zeros_like(self.control.lambda_nn), np.zeros_like(self.control.lambda_ni)
        shape = (len(targets), p.d_nu)
        new = signed_uniform(rng, shape, 0.5 * p.edge_change, 1.5 * p.edge_change)
        nn[targets] = new * (rng.random(shape) < p.edge_density)
        ni[targets] = -self.control.lambda_ni[targets] * rng.uniform(0.0, min(1.0, p.edge_change), (len(targets), 1))
        if gene < p.d_nu - 1:
            nn[first], ni[first] = -self.control.lambda_nn[first], -self.control.lambda_ni[first]
        return Mechanisms(np.tril(nn, -1), ni, mu, log_beta)

    def mechanisms(self, key: tuple[int, ...]) -> Mechanisms:
        """Parameters under the perturbation of the genes at positions `key`."""
        found = self.control
        for i in key:
            found = found + self.changes[i]
        return found

    def respond(self, key: tuple[int, ...], cells: Background) -> Response:
        """Log-rates of `cells` under a perturbation."""
        z_nu = self.mechanisms(key).solve(cells.z_iota, cells.noise)
        log_rate = self.world.mix(cells.z_iota, z_nu, cells.batch)
        log_rate[:, self.world.perturbed[list(key)]] += self.world.params.target_effect
        return Response(log_rate, z_nu)

    def planted_rows(self) -> dict[str, np.ndarray]:
        """Λ_νν, Λ_νι, μ, log β and the analytic mean of z_ν of every condition."""
        found = [self.mechanisms(key) for key in self.world.conditions.values()]
        silent = np.zeros((1, self.world.params.d_nu))
        mean_iota = self.world.mean_z_iota[None, :]
        return {
            "lambda_nn": np.stack([m.lambda_nn for m in found]),
            "lambda_ni": np.stack([m.lambda_ni for m in found]),
            "mu": np.stack([m.mu for m in found]),
            "log_beta": np.stack([m.log_beta for m in found]),
            "z_nu_expected": np.vstack([m.solve(mean_iota, silent) for m in found]),
        }
