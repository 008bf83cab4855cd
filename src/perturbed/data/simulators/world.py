"""What both generators share: the screen's design, the cells' background, the mixing and the counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import i0e, i1e

from perturbed.data.simulators.params import CommonParams
from perturbed.errors import ConfigError
from perturbed.names import CONTROL, join_genes

TARGET_SUM = 1e4
CYCLE_CONCENTRATION = 0.7  # of the phases' von Mises density: more cells in G1 than in M
STATE_SPREAD = 0.5

# One code a purpose: a draw for one purpose never shifts the draws for another.
GENES, LOADINGS, MIXING, BATCHES, STATES, PAIRS, GRAPH, EFFECTS, INTERACTIONS, CELLS, TRUTH, TRUTH_COUNTS = range(12)


def stream(seed: int, purpose: int, *keys: int) -> np.random.Generator:
    """The generator of one purpose, such as the cells of one perturbation."""
    return np.random.default_rng([seed, purpose, *keys])


def signed_uniform(rng: np.random.Generator, size: int | tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Uniform on ±[low, high]."""
    return rng.choice([-1.0, 1.0], size) * rng.uniform(low, high, size)


@dataclass(frozen=True)
class Background:
    """What a cell brings along whatever is done to it.

    Parameters
    ----------
    z_iota
        Invariant latents (n_cells, d_iota): state, cosine and sine of the phase, depth-related.
    state, batch
        Cluster and batch of each cell (n_cells,).
    phase
        Cell-cycle phase in radians (n_cells,).
    depth
        Expected counts of each cell (n_cells,).
    noise
        Standard normal noise of the responsive latents (n_cells, d_nu).
    """

    z_iota: np.ndarray
    state: np.ndarray
    batch: np.ndarray
    phase: np.ndarray
    depth: np.ndarray
    noise: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.depth)


@dataclass(frozen=True)
class Response:
    """What a perturbation does to cells.

    Parameters
    ----------
    log_rate
        Unnormalised log-rates (n_cells, n_genes).
    z_nu
        Responsive latents (n_cells, d_nu).
    """

    log_rate: np.ndarray
    z_nu: np.ndarray


class World:
    """Genes, programs, mixing, states and batches, drawn once per seed.

    The log-rate of gene g is `b_g + l_g · z_iota + m_g · z_nu + nonlinearity * v_g · s(U z + c) + batch_g`, with
    `z = (z_iota, z_nu)` and `s(a) = softplus(a) - softplus(0)`. Softplus keeps the mixing smooth, as the theory of
    PerturbedVAE asks.
    """

    def __init__(self, params: CommonParams, seed: int) -> None:
        self.params, self.seed = params, seed
        p = params
        width = max(3, len(str(p.n_genes)))
        self.genes = tuple(f"G{i + 1:0{width}d}" for i in range(p.n_genes))
        self.gene_ids = tuple(f"SIMG{i + 1:011d}" for i in range(p.n_genes))
        rng = stream(seed, GENES)
        self.bias = rng.normal(0.0, p.expression_sd, p.n_genes)
        self.dispersion = p.dispersion * np.exp(rng.normal(0.0, p.dispersion_sd, p.n_genes))
        # Perturbed genes are expressed in the middle range, as those that screens choose are.
        middle = np.argsort(np.abs(self.bias - np.median(self.bias)), kind="stable")
        pool = middle[: max(p.n_perturbed_genes, p.n_genes // 2)]
        self.perturbed = np.sort(rng.choice(pool, p.n_perturbed_genes, replace=False))
        self._draw_loadings()
        self._draw_states()
        shift = stream(seed, BATCHES).normal(0.0, p.batch_sd, (max(p.n_batches, 1), p.n_genes))
        self.batch_shift = shift if p.n_batches > 1 else np.zeros_like(shift)

    def _draw_loadings(self) -> None:
        p, rng = self.params, stream(self.seed, LOADINGS)
        shape = (p.n_genes, p.d_iota)
        self.loadings_iota = rng.normal(0.0, p.invariant_loading, shape) * (rng.random(shape) < p.invariant_density)
        self.gene_sets = np.zeros((p.n_genes, p.d_nu), dtype=bool)
        for k in range(p.d_nu):
            self.gene_sets[rng.choice(p.n_genes, p.gene_set_size, replace=False), k] = True
        sign = np.where(rng.random(self.gene_sets.shape) < 0.75, 1.0, -1.0)  # a program mostly rises as one
        size = p.responsive_loading * rng.uniform(0.4, 1.6, self.gene_sets.shape)
        self.loadings_nu = np.where(self.gene_sets, sign * size, 0.0)
        rng = stream(self.seed, MIXING)
        d = p.d_iota + p.d_nu
        self.mlp_in = rng.normal(0.0, 1.5 / np.sqrt(d), (p.hidden, d))
        self.mlp_bias = rng.normal(0.0, 1.0, p.hidden)
        keep = rng.random((p.n_genes, p.hidden)) < 0.15
        self.mlp_out = rng.normal(0.0, 1.0, (p.n_genes, p.hidden)) * keep

    def _draw_states(self) -> None:
        p, rng = self.params, stream(self.seed, STATES)
        self.state_centres = rng.normal(0.0, p.state_separation, (p.n_states, p.d_state))
        weight = 0.7 ** np.arange(p.n_states)
        self.state_weights = weight / weight.sum()

    @cached_property
    def pairs(self) -> np.ndarray:
        """The doubles as pairs of positions among the perturbed genes (n_doubles, 2), sorted."""
        n = self.params.n_perturbed_genes
        first, second = np.triu_indices(n, 1)
        chosen = np.sort(stream(self.seed, PAIRS).choice(len(first), self.params.n_doubles, replace=False))
        return np.column_stack([first[chosen], second[chosen]])

    @cached_property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Canonical name to positions among the perturbed genes: control, singles, doubles."""
        singles = [(i,) for i in range(self.params.n_perturbed_genes)]
        doubles = [(int(i), int(j)) for i, j in self.pairs]
        return {CONTROL: (), **{self.name(key): key for key in singles + doubles}}

    def name(self, key: tuple[int, ...]) -> str:
        """Canonical name of a tuple of positions among the perturbed genes."""
        return join_genes(self.genes[self.perturbed[i]] for i in key)

    @property
    def mean_z_iota(self) -> np.ndarray:
        """Population mean of the invariant latents (d_iota,)."""
        resultant = i1e(CYCLE_CONCENTRATION) / i0e(CYCLE_CONCENTRATION)
        return np.concatenate([self.state_weights @ self.state_centres, [resultant, 0.0, 0.0]])

    def draw_background(self, rng: np.random.Generator, n: int) -> Background:
        """Draw `n` cells' background; the same distribution for every perturbation."""
        p = self.params
        state = rng.choice(p.n_states, n, p=self.state_weights)
        z_state = self.state_centres[state] + rng.normal(0.0, STATE_SPREAD, (n, p.d_state))
        phase = rng.vonmises(0.0, CYCLE_CONCENTRATION, n)
        z_depth = rng.normal(size=n)
        rest = np.sqrt(1.0 - p.depth_correlation**2) * rng.normal(size=n)
        return Background(
            z_iota=np.column_stack([z_state, np.cos(phase), np.sin(phase), z_depth]),
            state=state,
            batch=rng.integers(max(p.n_batches, 1), size=n),
            phase=phase,
            depth=p.depth * np.exp(p.depth_sd * (p.depth_correlation * z_depth + rest)),
            noise=rng.normal(size=(n, p.d_nu)),
        )

    def mix(self, z_iota: np.ndarray, z_nu: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Unnormalised log-rates (n_cells, n_genes) of latents."""
        hidden = np.logaddexp(0.0, np.hstack([z_iota, z_nu]) @ self.mlp_in.T + self.mlp_bias) - np.log(2.0)
        linear = self.bias + z_iota @ self.loadings_iota.T + z_nu @ self.loadings_nu.T
        scale = self.params.nonlinearity / np.sqrt(self.params.hidden * 0.15)
        return linear + scale * (hidden @ self.mlp_out.T) + self.batch_shift[batch]


class Generator(ABC):
    """A way in which perturbations act on the cells of a world."""

    def __init__(self, params: CommonParams, seed: int) -> None:
        self.world = World(params, seed)

    @abstractmethod
    def respond(self, key: tuple[int, ...], cells: Background) -> Response:
        """Log-rates of `cells` under the perturbation of the genes at positions `key`; deterministic."""

    def dropout(self, key: tuple[int, ...], rate: np.ndarray) -> np.ndarray:
        """Probability that a count with expected value `rate` drops to zero (n_cells, n_genes), or a zero (1, 1)."""
        return np.zeros((1, 1))

    @abstractmethod
    def planted_rows(self) -> dict[str, np.ndarray]:
        """Planted parameters with one leading entry per condition, in the order of `world.conditions`."""

    def planted_labels(self) -> dict[str, list[str]]:
        """Planted labels, one per condition."""
        return {}


def expected_counts(log_rate: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Expected counts: `depth * softmax(log_rate)` per cell."""
    rate = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
    rate *= (depth / rate.sum(axis=1))[:, None]
    return rate


def draw_overdispersion(dispersion: np.ndarray, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Gamma factors of mean 1 and variance 1/dispersion (n_cells, n_genes): what the rate of a cell varies by."""
    return rng.standard_gamma(dispersion, (n_cells, len(dispersion))) / dispersion


def draw_counts(rate: np.ndarray, factor: np.ndarray, dropout: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts of `rate * factor`, thus negative binomial with variance `rate + rate²/θ`; then dropout.

    All arguments are (n_cells, n_genes); `dropout` is the probability that a count drops to zero.
    """
    counts = rng.poisson(rate * factor).astype(np.float32)
    if dropout.any():
        counts[rng.random(rate.shape, dtype=np.float32) < dropout] = 0.0
    return counts


def log_normalise(values: np.ndarray) -> np.ndarray:
    """`log1p(1e4 * x / sum(x))` per cell.

    Raises
    ------
    ConfigError
        If a cell has no counts, so that its normalised expression is undefined.
    """
    total = values.sum(axis=1, keepdims=True, dtype=np.float64)
    if not (total > 0).all():
        raise ConfigError("source.params.depth: a simulated cell has no counts; raise the depth or lower depth_sd")
    return np.log1p(values * (TARGET_SUM / total))


def describe(world: World) -> dict[str, Any]:
    """Names of the planted programs."""
    state = [f"state{i + 1}" for i in range(world.params.d_state)]
    responsive = ["shared", *(f"program{k:02d}" for k in range(1, world.params.d_nu))]
    return {"z_iota": [*state, "cycle_cos", "cycle_sin", "depth"], "z_nu": responsive}
