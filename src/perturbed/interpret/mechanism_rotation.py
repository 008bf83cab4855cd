"""Choose, among coordinates the likelihood cannot tell apart, those in which mechanisms are sparsest.

In every environment the SCM's prior of (z_ι, z_ν) is a Gaussian whose conditional covariance of z_ν is arbitrary: free
strictly lower-triangular Λ(u) and free β(u) are its LDL decomposition. So `z_ν' = M z_ν + B z_ι + c` with any
invertible M and any B lies in the model too, with the same likelihood, and the ELBO leaves M and B to chance. What
singles out the true coordinates is the theory's assumption (iv): the latent whose parents an environment removes is
there independent of z_ι. A direction w = (a, b) with `a·z_ν + b·z_ι` independent of z_ι in several environments at
once is rare unless it is a latent; it is sought here, without being told which environments share a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh

TOLERANCE = 0.05
"""Error of a slope, in conditional standard deviations, that imperfect unmixing leaves however many the cells."""
CAPS = (10.0, 20.0, 50.0)
"""A direction whose squared dependence on z_ι exceeds so many times its error variance is taken to have parents. The
last one judges; the others propose, too, since how far imperfect latents are from independence is not known."""
LEAST_ANGLE = 0.1
"""Least singular value of the unit vectors of the directions taken; keeps them from being the same one twice."""
N_STARTS = 4
"""Searches begin with so many of the best single directions under each cap."""
ROUNDS = 10
"""Most rounds of refitting a direction and its environments."""


class Rotation(NamedTuple):
    """An affine change of coordinates of the responsive latents."""

    of_nu: np.ndarray
    """M (d_nu, d_nu)."""
    of_iota: np.ndarray
    """B (d_nu, d_iota)."""
    orphaned: tuple[tuple[int, ...], ...]
    """For each new latent the environments in which it has no parents."""

    def apply(self, z_nu: np.ndarray, z_iota: np.ndarray) -> np.ndarray:
        """`M z_ν + B z_ι` (n_cells, d_nu)."""
        return z_nu @ self.of_nu.T + z_iota @ self.of_iota.T


class Slopes(NamedTuple):
    """How z_ν depends on the whitened z_ι in each environment."""

    slope: np.ndarray
    """(n_environments, d_nu, d_iota)."""
    covariance: np.ndarray
    """Error covariance over z_ν of each entry of a column of `slope` (n_environments, d_nu, d_nu)."""
    whitener: np.ndarray
    """W such that `(z_ι − mean) Wᵀ` is white (d_iota, d_iota)."""


def estimate_slopes(z_nu: np.ndarray, z_iota: np.ndarray, environment: np.ndarray) -> Slopes:
    """Regress z_ν on the whitened z_ι within each environment, by least squares."""
    values, vectors = np.linalg.eigh(np.cov(z_iota.T))
    whitener = (vectors / np.sqrt(np.maximum(values, 1e-8 * values.max()))).T
    white = (z_iota - z_iota.mean(0)) @ whitener.T
    slopes, covariances = [], []
    for e in np.unique(environment):
        rows = environment == e
        design = np.hstack([np.ones((int(rows.sum()), 1)), white[rows]])
        weights = np.linalg.lstsq(design, z_nu[rows], rcond=None)[0]
        residual = z_nu[rows] - design @ weights
        variance = residual.T @ residual / max(1, len(design) - design.shape[1])
        slopes.append(weights[1:].T)
        covariances.append(variance * (1 / len(design) + TOLERANCE**2))
    return Slopes(np.array(slopes), np.array(covariances), whitener)


def dependence(slopes: Slopes, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared slope of `a·z_ν + b·z_ι` on z_ι over its error variance, in each environment; about 1 without."""
    distance = np.einsum("i,uij->uj", a, slopes.slope) + b
    return np.square(distance).mean(1) / np.einsum("i,uij,j->u", a, slopes.covariance, a)


def find_direction(slopes: Slopes, environments: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The direction (a, b) that depends least on z_ι in all `environments` together.

    `min_{a,b} Σ_u ‖a C_u + b‖² / Σ_u a V_u aᵀ`: b is minus the mean of `a C_u`, a the generalised eigenvector of the
    smallest eigenvalue of the scatter of the slopes C_u against their error.
    """
    chosen = list(environments)
    slope, error = slopes.slope[chosen], slopes.covariance[chosen]
    weight = np.ones(len(chosen))
    a = mean = np.empty(0)
    for _ in range(3):  # environments in which the direction is measured better count for more
        mean = np.einsum("u,uij->ij", weight, slope) / weight.sum()
        scatter = np.einsum("u,uij,ukj->ik", weight, slope - mean, slope - mean)
        a = eigh(scatter, np.einsum("u,uij->ij", weight, error))[1][:, 0]
        weight = 1 / np.einsum("i,uij,j->u", a, error, a)
        weight /= weight.mean()
    return a, -a @ mean


class _Candidate(NamedTuple):
    environments: tuple[int, ...]
    a: np.ndarray
    b: np.ndarray


def _candidates(slopes: Slopes) -> list[_Candidate]:
    """Directions proposed by pairs of environments and refitted to all in which they are independent of z_ι.

    The latents as they are, less their mean dependence on z_ι, come behind them, so that there are always enough.
    """
    found: dict[tuple[int, ...], _Candidate] = {}
    for cap in CAPS:
        for pair in combinations(range(len(slopes.slope)), 2):
            environments: tuple[int, ...] = pair
            for _ in range(ROUNDS):
                a, b = find_direction(slopes, environments)
                near = tuple(int(e) for e in np.flatnonzero(dependence(slopes, a, b) < cap))
                if len(near) < 2 or near == environments:
                    break
                environments = near
            if environments not in found:
                found[environments] = _Candidate(environments, *find_direction(slopes, environments))
    mean = slopes.slope.mean(0)
    own = [_Candidate((), a, -a @ mean) for a in np.eye(len(mean))]
    return [*(found[environments] for environments in sorted(found)), *own]


def _cost(dependences: np.ndarray) -> float:
    """What the directions (rows) leave unexplained: the least capped dependence of each environment, summed."""
    return float(np.minimum(dependences.min(0), CAPS[-1]).sum())


def _choose(costs: np.ndarray, units: np.ndarray, n: int) -> list[int]:
    """Indices of `n` independent candidates of least joint `_cost`: greedy choices and exchanges from many starts."""
    alone = [np.argsort(np.minimum(costs, cap).sum(1), kind="stable")[:N_STARTS] for cap in CAPS]
    starts = sorted({int(i) for order in alone for i in order})
    return min((_improve(_complete([i], costs, units, n), costs, units) for i in starts), key=lambda c: _cost(costs[c]))


def _angle(units: np.ndarray) -> float:
    return float(np.linalg.svd(units, compute_uv=False)[-1])


def _complete(chosen: list[int], costs: np.ndarray, units: np.ndarray, n: int) -> list[int]:
    """Add the candidate that lowers the cost most until there are `n`."""
    while len(chosen) < n:
        left = [i for i in range(len(costs)) if i not in chosen]
        left.sort(key=lambda i: _cost(costs[[*chosen, i]]))
        best = next((i for i in left if _angle(units[[*chosen, i]]) > LEAST_ANGLE), None)
        if best is None:  # nearly parallel to those taken, all of them
            best = max(left, key=lambda i: _angle(units[[*chosen, i]]))
        chosen = [*chosen, best]
    return chosen


def _improve(chosen: list[int], costs: np.ndarray, units: np.ndarray) -> list[int]:
    """Exchange one candidate at a time while that lowers the cost."""
    for _ in range(ROUNDS):
        trials = [[*chosen[:k], i, *chosen[k + 1 :]] for k in range(len(chosen)) for i in range(len(costs))]
        now = _cost(costs[chosen])
        better = sorted((cost, trial) for trial in trials if (cost := _cost(costs[trial])) < now)
        best = next((trial for _, trial in better if _angle(units[trial]) > LEAST_ANGLE), None)
        if best is None:
            break
        chosen = best
    return chosen


def rotate_to_sparse_mechanisms(z_nu: np.ndarray, z_iota: np.ndarray, environment: np.ndarray) -> Rotation:
    """Coordinates of z_ν in which as many environments as possible leave some latent without parents.

    Every pair of environments proposes the direction that is least dependent on z_ι in both; environments in which
    it is independent too join, and the direction is refitted. Of all proposals those d_nu are taken that together
    leave the fewest environments unexplained, the capped `dependence` of an environment's best direction counting.
    Uses latents only, no truth; an environment is taken to remove the parents of one latent.

    Parameters
    ----------
    z_nu, z_iota
        Estimated latents of training cells (n_cells, d_nu), (n_cells, d_iota).
    environment
        (n_cells,).
    """
    slopes = estimate_slopes(z_nu, z_iota, environment)
    proposals = _candidates(slopes)
    units = np.array([c.a for c in proposals]) @ np.linalg.cholesky(slopes.covariance.mean(0))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    costs = np.array([dependence(slopes, c.a, c.b) for c in proposals])
    kept = [proposals[i] for i in _choose(costs, units, z_nu.shape[1])]
    for _ in range(ROUNDS):
        costs = np.array([dependence(slopes, c.a, c.b) for c in kept])
        best, explained = costs.argmin(0), costs.min(0) < CAPS[-1]
        groups = [tuple(int(e) for e in np.flatnonzero((best == i) & explained)) for i in range(len(kept))]
        refitted = [
            c if len(g) < 2 or g == c.environments else _Candidate(g, *find_direction(slopes, g))
            for c, g in zip(kept, groups)
        ]
        if all(new is old for new, old in zip(refitted, kept)):
            break
        kept = refitted
    return _rotation(slopes, [(c.a, c.b) for c in kept], [c.environments for c in kept])


def rotate_to_targets(z_nu: np.ndarray, z_iota: np.ndarray, environment: np.ndarray, target: np.ndarray) -> Rotation:
    """The same when it is known which environments share a target.

    Parameters
    ----------
    z_nu, z_iota, environment
        As in `rotate_to_sparse_mechanisms`.
    target
        Label of the latent without parents in each environment, by position of the sorted environments.
    """
    slopes = estimate_slopes(z_nu, z_iota, environment)
    groups = [tuple(np.flatnonzero(target == label).tolist()) for label in np.unique(target[target >= 0])]
    return _rotation(slopes, [find_direction(slopes, group) for group in groups], groups)


def _rotation(
    slopes: Slopes, directions: Sequence[tuple[np.ndarray, np.ndarray]], orphaned: Sequence[tuple[int, ...]]
) -> Rotation:
    of_nu = np.array([a for a, _ in directions])
    of_iota = np.array([b for _, b in directions]) @ slopes.whitener
    return Rotation(of_nu, of_iota, tuple(orphaned))


class Edges(NamedTuple):
    """Weights among responsive latents."""

    weight: np.ndarray
    """Root mean square over environments of the standardised weight at [child, parent] (d_nu, d_nu)."""
    order: tuple[int, ...]
    """Causal order, roots first."""


def estimate_edges(
    z_nu: np.ndarray,
    z_iota: np.ndarray,
    environment: np.ndarray,
    *,
    order: tuple[int, ...] | None = None,
    orphaned: Sequence[tuple[int, ...]] = (),
) -> Edges:
    """Regress each responsive latent on those before it and on z_ι, environment by environment.

    Weights are standardised by the conditional standard deviations of child and parent. Without an `order` the one is
    taken under which the latents of `orphaned` environments depend least on those before them: a wrong order makes a
    parentless cause depend on its effects.

    Parameters
    ----------
    z_nu, z_iota, environment
        Latents of training cells.
    order
        Known causal order.
    orphaned
        For each latent the environments in which it has no parents; needed where `order` is unknown.
    """
    covariances = [
        _residual_covariance(z_nu[environment == e], z_iota[environment == e]) for e in np.unique(environment)
    ]
    covariance = np.array(covariances)
    d_nu = z_nu.shape[1]
    if order is None:
        order = min(permutations(range(d_nu)), key=lambda o: (_order_cost(covariance, o, orphaned), o))
    weights = np.zeros((d_nu, d_nu))
    for place, child in enumerate(order):
        before = list(order[:place])
        slope = np.array([_regress(c, child, before)[0] for c in covariance])
        spread = np.sqrt([np.diag(c) for c in covariance])
        weights[child, before] = np.sqrt(np.square(slope * spread[:, before] / spread[:, [child]]).mean(0))
    return Edges(weights, tuple(order))


def _residual_covariance(z_nu: np.ndarray, z_iota: np.ndarray) -> np.ndarray:
    design = np.hstack([np.ones((len(z_nu), 1)), z_iota])
    residual = z_nu - design @ np.linalg.lstsq(design, z_nu, rcond=None)[0]
    return np.asarray(residual.T @ residual / max(1, len(z_nu) - design.shape[1]))


def _regress(covariance: np.ndarray, child: int, parents: list[int]) -> tuple[np.ndarray, float]:
    """Slopes on the parents, and the share of the child's variance that they leave."""
    if not parents:
        return np.empty(0), 1.0
    slope = np.linalg.solve(covariance[np.ix_(parents, parents)], covariance[parents, child])
    return slope, float(1 - slope @ covariance[parents, child] / covariance[child, child])


def _order_cost(covariance: np.ndarray, order: tuple[int, ...], orphaned: Sequence[tuple[int, ...]]) -> float:
    cost = 0.0
    for place, child in enumerate(order):
        for e in orphaned[child]:
            cost -= np.log(max(_regress(covariance[e], child, list(order[:place]))[1], 1e-12))
    return cost
