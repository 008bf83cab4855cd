"""Small cells with planted truth for the tests of the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse

from perturbed.models.base import TrainingData
from perturbed.names import CONTROL, genes_of, join_genes


@dataclass(frozen=True)
class Planted:
    data: TrainingData
    """Control and singles."""
    doubles: dict[str, np.ndarray]
    """Noise-free mean expression of combinations that are not in `data`."""
    control: np.ndarray
    """Noise-free control mean."""


def plant(
    *,
    n_single: int = 8,
    n_cells: int = 40,
    n_control: int = 80,
    n_genes: int = 50,
    contexts: tuple[str, ...] = ("all",),
    combos: tuple[str, ...] = (),
    counts: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Planted:
    """Cells of a linear-Gaussian SCM: z_nu = (I - L)^-1 (B z_iota + mu(u) + noise), x = softplus-like positive mixing.

    Genes are G00.., perturbed genes are the first `n_single` of them. `combos` are added to the training cells.
    """
    rng = np.random.default_rng([seed, 11])
    n_nu, n_iota = 5, 4
    edges = np.tril(rng.normal(0, 0.4, (n_nu, n_nu)), -1)
    inputs = rng.normal(0, 0.2, (n_nu, n_iota))
    mix = rng.normal(0, 0.35, (n_genes, n_nu + n_iota))
    base = rng.uniform(1.5, 4.0, n_genes)
    genes = [f"G{i:02d}" for i in range(n_genes)]
    shift = {gene: rng.normal(0, 1.0, n_nu) * (rng.random(n_nu) < 0.6) + 0.3 for gene in genes[:n_single]}
    offset = {context: 0.5 * i for i, context in enumerate(contexts)}

    def simulate(perturbation: str, context: str, n: int, noise: float) -> np.ndarray:
        z_iota = rng.normal(size=(n, n_iota)) * noise
        mu = sum((shift[gene] for gene in genes_of(perturbation)), np.zeros(n_nu))
        right = z_iota @ inputs.T + mu + 0.4 * noise * rng.normal(size=(n, n_nu))
        z_nu = np.linalg.solve(np.eye(n_nu) - edges, right.T).T
        return base + offset[context] + np.hstack([z_nu, z_iota]) @ mix.T

    labels, where, blocks = [], [], []
    for context in contexts:
        for perturbation in [CONTROL, *genes[:n_single], *combos]:
            n = n_control if perturbation == CONTROL else n_cells
            blocks.append(simulate(perturbation, context, n, 1.0) + 0.3 * rng.normal(size=(n, n_genes)))
            labels += [perturbation] * n
            where += [context] * n
    expression = np.maximum(np.vstack(blocks), 0)
    count_matrix = library = None
    if counts:
        raw = rng.poisson(np.expm1(np.minimum(expression, 5)))
        count_matrix = sparse.csr_matrix(raw.astype(np.float32))
        library = raw.sum(axis=1).astype(np.float64)
        expression = np.log1p(raw / library[:, None] * 1e3)
    is_val = rng.random(len(labels)) < val_fraction
    doubles = {
        join_genes([a, b]): simulate(join_genes([a, b]), contexts[0], 1, 0.0)[0]
        for i, a in enumerate(genes[:n_single])
        for b in genes[i + 1 : n_single]
        if join_genes([a, b]) not in combos
    }
    data = TrainingData(
        X=sparse.csr_matrix(expression.astype(np.float32)),
        perturbation=np.array(labels),
        context=np.array(where),
        is_val=is_val,
        genes=tuple(genes),
        centre=np.zeros(n_genes),
        loadings=np.eye(n_genes)[:, :3],
        counts=count_matrix,
        library=library,
    )
    return Planted(data, doubles, simulate(CONTROL, contexts[0], 1, 0.0)[0])


def only(data: TrainingData, keep: np.ndarray) -> TrainingData:
    """Some of the cells."""
    return replace(
        data, X=data.X[keep], perturbation=data.perturbation[keep], context=data.context[keep], is_val=data.is_val[keep]
    )


def reorder(data: TrainingData, order: np.ndarray) -> TrainingData:
    """The same cells with genes in another order."""
    return replace(
        data,
        X=data.X[:, order],
        genes=tuple(data.genes[i] for i in order),
        centre=data.centre[order],
        loadings=data.loadings[order],
        counts=None if data.counts is None else data.counts[:, order],
    )


@contextmanager
def carried_weights(order: np.ndarray) -> Iterator[None]:
    """Initial weights drawn inside go with their genes: gene `order[i]` of before has its weights at place i.

    An axis of a weight belongs to the genes where it is as long as them, or longer: what else a layer reads or writes
    stands behind them. Draws from a generator of their own are no weights.
    """

    def carry(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(*args: Any, **options: Any) -> torch.Tensor:
            found = draw(*args, **options)
            if options.get("generator") is None:
                with torch.no_grad():
                    found.copy_(_take_genes(found, torch.from_numpy(order)))
            return found

        return drawn

    import pytest  # the environments of baselines, which plant cells too, have none

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "uniform_", "normal_"):
            patch.setattr(torch.nn.init, name, carry(getattr(torch.nn.init, name)))
        patch.setattr(torch, "randn", carry(torch.randn))
        yield


def _take_genes(weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    for axis, size in enumerate(weights.shape):
        if size >= len(order):
            weights = weights.index_select(axis, torch.cat([order, torch.arange(len(order), size)]))
    return weights
