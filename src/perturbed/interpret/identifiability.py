"""Whether PerturbedVAE finds planted latents: fits with floors and a ceiling (paper: table 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.linalg import eigh

from perturbed.interpret.identifiability_class import FittedClass, fit_class
from perturbed.interpret.identifiability_spec import Arm, EstimatorOptions, IdentifiabilitySetting
from perturbed.interpret.latent_network import LatentLoss, LatentVAE
from perturbed.interpret.latent_simulation import TEST, TRAIN, LatentCells, LatentWorld
from perturbed.interpret.matching import block_r2, mean_correlation, structural_hamming_distance
from perturbed.interpret.mechanism_rotation import (
    Edges,
    estimate_edges,
    rotate_to_sparse_mechanisms,
    rotate_to_targets,
)
from perturbed.models.base import FitRun
from perturbed.models.nn.schedules import warm_up_linearly
from perturbed.training import Random, Task, seeded_weights, train
from perturbed.training_options import TrainingOptions

VAL_FRACTION = 0.1
EDGE_THRESHOLD = 0.25
"""Edges of less weight are pruned, as in the paper's figure 8."""
FLOOR = 0.03
"""Principal components are divided by their standard deviation, but by no less than this share of the first one's."""


class Latents(NamedTuple):
    """Estimated latents of cells."""

    z_nu: np.ndarray
    """(n_cells, at least d_nu)."""
    z_iota: np.ndarray
    """(n_cells, any number)."""


class Inputs:
    """Scaled principal components of x, fitted on training cells and their partners.

    Rotation and scaling lose nothing where x lies in a subspace; the likelihood then learns the noise along principal
    directions instead of along genes.
    """

    def __init__(self, cells: LatentCells, n_components: int) -> None:
        x = np.vstack([cells.x, cells.x_control])
        self.mean = x.mean(0)
        values, vectors = np.linalg.eigh(np.cov(x.T))
        values, vectors = values[::-1][:n_components], vectors[:, ::-1][:, :n_components]
        filled = values > 1e-10 * values[0]
        sd = np.sqrt(values[filled])
        self.scale = np.maximum(sd, FLOOR * sd[0])
        self.loadings = vectors[:, filled] / self.scale

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scores of cells (n_cells, n_components or fewer), float32."""
        return ((x - self.mean) @ self.loadings).astype(np.float32)


@dataclass(frozen=True)
class Fitted:
    """The best of the restarts."""

    network: LatentVAE
    inputs: Inputs
    val_loss: float

    @torch.no_grad()
    def encode(self, x: np.ndarray, environment: np.ndarray) -> Latents:
        """Posterior means of cells."""
        device = next(self.network.parameters()).device
        scores = torch.from_numpy(self.inputs(x)).to(device)
        posterior = self.network.encode(scores, torch.from_numpy(environment.astype(np.int64)).to(device))
        return Latents(posterior.nu_mean.double().cpu().numpy(), posterior.iota_mean.double().cpu().numpy())


@contextmanager
def _limit_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_network(
    cells: LatentCells,
    sizes: tuple[int, int, int],
    options: EstimatorOptions,
    *,
    arm: Arm,
    seed: int,
    device: str = "cpu",
    plain: bool = False,
) -> Fitted:
    """Fit from several initial weights and keep the fit with the lowest validation loss.

    Parameters
    ----------
    cells
        Training cells; a tenth, drawn by `seed`, validates.
    sizes
        Environments, responsive and invariant latents.
    options
        The estimator's options.
    arm
        What the fit knows of the pairs.
    seed, device
        Of weights, order and draws; where to train.
    plain
        Fit a plain VAE.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(cells.x))
    val, rest = np.split(order, [round(VAL_FRACTION * len(order))])
    inputs = Inputs(_rows(cells, rest), options.n_components)
    fits = [
        _fit_once(cells, inputs, sizes, options, arm, (rest, val), 1000 * seed + start, device, plain)
        for start in range(options.restarts)
    ]
    return min(fits, key=lambda fit: fit.val_loss)


def _rows(cells: LatentCells, rows: np.ndarray) -> LatentCells:
    return LatentCells(*(getattr(cells, name)[rows] for name in LatentCells.__dataclass_fields__))


def _fit_once(
    cells: LatentCells,
    inputs: Inputs,
    sizes: tuple[int, int, int],
    options: EstimatorOptions,
    arm: Arm,
    split: tuple[np.ndarray, np.ndarray],
    seed: int,
    device: str,
    plain: bool,
) -> Fitted:
    x, x_control = (torch.from_numpy(inputs(part)).to(device) for part in (cells.x, cells.x_control))
    environment = torch.from_numpy(cells.environment.astype(np.int64)).to(device)
    with seeded_weights(seed):
        network = LatentVAE(x.shape[1], *sizes, options, plain).to(device)
    network.start_at(*start_directions(cells, inputs, split[0], sizes, paired=arm in ("aligned", "start_only")))
    alpha = options.alpha if arm in ("aligned", "penalty_only") else 0.0
    batch = min(options.batch_size, len(split[0]))
    epochs = -(-options.steps // -(-len(split[0]) // batch))

    def step(rows: np.ndarray, random: Random, epoch: int | None) -> LatentLoss:
        at = torch.from_numpy(rows).to(device)
        weight = 1.0 if epoch is None else warm_up_linearly(epoch, round(options.warm_up * epochs))
        draws = torch.randn(2 * len(rows), sizes[1] + sizes[2], generator=random.torch, device=device)
        both = torch.cat([environment[at], torch.zeros_like(at)])
        return network.loss(
            torch.cat([x[at], x_control[at]]), both, draws, n_cells=len(rows), kl_weight=weight, alpha=alpha
        )

    training = TrainingOptions(lr=options.lr, lr_final=0.01, batch_size=batch, epochs=epochs, max_steps=options.steps)
    history = train(Task(network, step, split[0], split[1]), training, FitRun(seed=seed, device=device, progress=False))
    return Fitted(network.eval(), inputs, history.epochs[-1]["val_loss"])


def start_directions(
    cells: LatentCells, inputs: Inputs, rows: np.ndarray, sizes: tuple[int, int, int], *, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Linear encoder and decoder to begin with, from the training cells `rows`.

    With pairs, z_ι begins at the canonical directions that cells share with their partners,
    `(S_12 + S_21) w = ρ (S_11 + S_22) w`, and z_ν at the principal components of what they leave; without, all latents
    begin at principal components. Both are scaled to variance 1.

    Returns
    -------
    tuple of ndarray
        Directions (d_iota + d_nu, n_inputs), and the regression of the inputs on them (n_inputs, d_iota + d_nu).
    """
    first, second = (inputs(x[rows]).astype(np.float64) for x in (cells.x, cells.x_control))
    both = np.vstack([first, second])
    centred = both - both.mean(0)
    if paired:
        a, b = first - first.mean(0), second - second.mean(0)
        within = a.T @ a + b.T @ b
        shared = eigh(a.T @ b + b.T @ a, within + 1e-3 * np.diag(np.diag(within)))[1][:, ::-1][:, : sizes[2]]
    else:
        shared = np.empty((both.shape[1], 0))
    z = centred @ shared
    left = centred - z @ np.linalg.lstsq(z, centred, rcond=None)[0] if paired else centred
    axes = np.linalg.svd(left * inputs.scale, full_matrices=False)[2][: sizes[1] + sizes[2] - shared.shape[1]]
    rest = np.linalg.lstsq(centred, (left * inputs.scale) @ axes.T, rcond=None)[0]
    directions = np.hstack([shared, rest])
    directions /= (centred @ directions).std(0)
    decoder = np.linalg.lstsq(centred @ directions, centred, rcond=None)[0]
    return directions.T, decoder.T


# --- scores -------------------------------------------------------------------------------------------------------


def run_setting(setting: IdentifiabilitySetting, seed: int, device: str = "cpu", threads: int = 1) -> pd.DataFrame:
    """Draw a world, fit every arm and score it on test cells, beside floors and a ceiling.

    Parameters
    ----------
    setting
        World and estimator.
    seed
        Of world, cells and fits.
    device, threads
        Where to fit, and on how many threads.

    Returns
    -------
    DataFrame
        One row for each arm, estimator and metric: `setting, factor, level, n_environments, n_cells, noise, seed,
        arm, estimator, metric, value`. Metrics: `mcc_pooled`, `mcc_within`, `r2_nu`, `r2_iota`, `shd`. `arm` is `none`
        for what knows no alignment.
    """
    world = LatentWorld(setting.world, seed)
    train_cells, test = world.draw(TRAIN, setting.world.n_train), world.draw(TEST, setting.world.n_test)
    sizes = (setting.world.n_environments, setting.world.d_nu, setting.world.d_iota)
    rows: list[tuple[str, str, str, float]] = []
    with _limit_threads(threads):
        for name, latents in _references(setting, train_cells, test, sizes, seed):
            rows += [("none", name, *score) for score in score_latents(test, latents)]
        rows.append(("none", "empty_graph", "shd", float(world.graph.sum())))
        for arm in setting.arms:
            fitted = fit_network(train_cells, sizes, setting.estimator, arm=arm, seed=seed, device=device)
            rows += [(arm, *scored) for scored in _score_fit(world, train_cells, test, fitted)]
        if setting.perturbedvae_class:
            for name, fit in fit_class(train_cells, sizes[1:], seed=seed, device=device):
                scored = _score_fit(world, train_cells, test, fit, "perturbedvae_class")
                rows += [(name, *score) for score in scored]
        if setting.plain_vae:
            fitted = fit_network(
                train_cells, sizes, setting.estimator, arm="unaligned", seed=seed, device=device, plain=True
            )
            both = np.hstack(fitted.encode(test.x, test.environment))
            rows += [("none", "plain_vae", *score) for score in score_latents(test, Latents(both, both))]
    return _describe(setting, seed, rows)


def _describe(setting: IdentifiabilitySetting, seed: int, rows: list[tuple[str, str, str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["arm", "estimator", "metric", "value"])
    columns: dict[str, str | float] = {
        "setting": setting.name,
        "factor": setting.factor,
        "level": setting.level,
        "n_environments": setting.world.n_environments,
        "n_cells": setting.world.n_train,
        "noise": setting.world.noise,
        "seed": seed,
    }
    for place, (name, value) in enumerate(columns.items()):
        table.insert(place, name, value)
    return table


def score_latents(test: LatentCells, latents: Latents) -> list[tuple[str, float]]:
    """MCC of z_ν pooled and within environments, and R² of both blocks, on test cells."""
    return [
        ("mcc_pooled", mean_correlation(test.z_nu, latents.z_nu)[0]),
        ("mcc_within", mean_correlation(test.z_nu, latents.z_nu, test.environment)[0]),
        ("r2_nu", block_r2(test.z_nu, latents.z_nu)),
        ("r2_iota", block_r2(test.z_iota, latents.z_iota)),
    ]


def _score_fit(
    world: LatentWorld,
    cells: LatentCells,
    test: LatentCells,
    fitted: Fitted | FittedClass,
    name: str = "perturbedvae",
) -> Iterator[tuple[str, str, float]]:
    """Scores of the latents as trained, rotated to sparse mechanisms, and rotated by the known targets."""
    own, other = (Latents(*fitted.encode(part.x, part.environment)) for part in (cells, test))
    fixed = tuple(range(own.z_nu.shape[1]))  # as trained, the order of the latents is the causal order
    edges = estimate_edges(*own, cells.environment, order=fixed)
    yield from _score_one(name, world, test, other, edges)
    rotations = {f"{name}_rotated": rotate_to_sparse_mechanisms(*own, cells.environment)}
    counts = np.bincount(world.orphan[world.orphan >= 0], minlength=own.z_nu.shape[1])
    if counts.min() >= 2:
        rotations[f"{name}_targets"] = rotate_to_targets(*own, cells.environment, world.orphan)
    for rotated, rotation in rotations.items():
        edges = estimate_edges(rotation.apply(*own), own.z_iota, cells.environment, orphaned=rotation.orphaned)
        yield from _score_one(rotated, world, test, Latents(rotation.apply(*other), other.z_iota), edges)


def _score_one(
    name: str, world: LatentWorld, test: LatentCells, latents: Latents, edges: Edges
) -> Iterator[tuple[str, str, float]]:
    for metric, value in score_latents(test, latents):
        yield name, metric, value
    matched = mean_correlation(test.z_nu, latents.z_nu, test.environment)[1]
    graph = edges.weight[np.ix_(matched, matched)] > EDGE_THRESHOLD
    yield name, "shd", float(structural_hamming_distance(world.graph, graph))


def _references(
    setting: IdentifiabilitySetting, cells: LatentCells, test: LatentCells, sizes: tuple[int, int, int], seed: int
) -> Iterator[tuple[str, Latents]]:
    """Floors, and the ceiling of a linear regression from x to the true latents."""
    inputs = Inputs(cells, setting.estimator.n_components)
    own, other = inputs(cells.x).astype(np.float64), inputs(test.x).astype(np.float64)
    means = [
        np.vstack([z[cells.environment == e].mean(0) for e in range(sizes[0])]) for z in (cells.z_nu, cells.z_iota)
    ]
    yield "environment_mean", Latents(means[0][test.environment], means[1][test.environment])
    components = other[:, : sizes[1] + sizes[2]]
    yield "pca", Latents(components, components)
    with seeded_weights(seed):
        network = LatentVAE(own.shape[1], *sizes, setting.estimator)
    yield "untrained", Fitted(network.eval(), inputs, np.nan).encode(test.x, test.environment)
    design, scored = (np.hstack([np.ones((len(s), 1)), s]) for s in (own, other))
    yield (
        "supervised_linear",
        Latents(*(scored @ np.linalg.lstsq(design, z, rcond=None)[0] for z in (cells.z_nu, cells.z_iota))),
    )
