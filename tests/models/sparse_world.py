"""Cells whose perturbations shift few latents, some none at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from perturbed.models.base import Method, TrainingData
from perturbed.names import CONTROL


@dataclass(frozen=True)
class SparseWorld:
    data: TrainingData
    effects: dict[str, np.ndarray]
    """Measured mean effect of every perturbation on log-normalised expression."""
    control: np.ndarray
    inert: np.ndarray
    """True for the perturbed genes, in order, that do nothing."""


def plant_sparse_shifts(
    *,
    n_cells: int = 60,
    n_control: int = 150,
    n_genes: int = 40,
    counts: bool = False,
    null: bool = False,
    seed: int = 0,
) -> SparseWorld:
    """`x = base + W (z + shift)`, with one of four latents shifted by ±2.5 for each of six genes; two more do nothing.

    With `null` none does anything.
    """
    rng = np.random.default_rng(77)
    names = [f"G{i:02d}" for i in range(8)]
    inert = np.array([null or i >= 6 for i in range(8)])
    shifts = np.zeros((8, 4))
    for i in np.flatnonzero(~inert):
        shifts[i, i % 4] = 2.5 if i < 4 else -2.5
    loading, base = rng.normal(0, 0.4, (n_genes, 4)), rng.uniform(2, 4, n_genes)
    labels = np.repeat([CONTROL, *names], [n_control] + [n_cells] * 8)
    z = (
        rng.normal(size=(len(labels), 4))
        + np.vstack([np.zeros((1, 4)), shifts])[np.repeat(np.arange(9), [n_control] + [n_cells] * 8)]
    )
    x = np.maximum(base + z @ loading.T + 0.3 * rng.normal(size=(len(labels), n_genes)), 0)
    raw = library = None
    if counts:
        raw = rng.poisson(np.expm1(np.minimum(x, 5)))
        library = raw.sum(axis=1).astype(np.float64)
        x = np.log1p(raw / library[:, None] * 1e3)
    data = TrainingData(
        sparse.csr_matrix(x.astype(np.float32)), labels, np.full(len(labels), "all"), np.zeros(len(labels), bool),
        tuple(f"G{i:02d}" for i in range(n_genes)), np.zeros(n_genes), np.eye(n_genes)[:, :3],
        None if raw is None else sparse.csr_matrix(raw.astype(np.float32)), library,
    )  # fmt: skip
    control = x[labels == CONTROL].mean(axis=0)
    effects = {name: x[labels == name].mean(axis=0) - control for name in names}
    return SparseWorld(data, effects, control, inert)


def effect_match(method: Method, world: SparseWorld) -> tuple[float, float]:
    """Mean correlation and mean regression slope of predicted on measured effects, over the genes that act."""
    start = method.predict_one(CONTROL, "all")["mean"]
    found = []
    for name, inert in zip(sorted(world.effects), world.inert):
        if not inert:
            effect, predicted = world.effects[name], method.predict_one(name, "all")["mean"] - start
            found.append((np.corrcoef(effect, predicted)[0, 1], effect @ predicted / (effect @ effect)))
    correlation, slope = np.mean(found, axis=0)
    return float(correlation), float(slope)


def control_error(method: Method, world: SparseWorld) -> float:
    """Root mean squared error of the predicted control mean."""
    return float(np.sqrt(np.square(method.predict_one(CONTROL, "all")["mean"] - world.control).mean()))
