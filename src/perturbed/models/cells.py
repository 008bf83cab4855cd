"""Training cells as batches with control partners, for models that compare a perturbed cell with a control cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbed.errors import MethodError
from perturbed.models.base import TrainingData
from perturbed.models.nn.likelihoods import Counts, gather_counts
from perturbed.names import CONTROL, genes_of
from perturbed.training import dense_rows


class Batch(NamedTuple):
    """Cells of a training step with their control partners."""

    x: Tensor
    """Log-normalised expression, first the cells, then one control partner for each (2 n_cells, n_genes)."""
    conditions: Tensor
    """Multi-hot of the distinct conditions in the batch (n_conditions, n_perturbed)."""
    condition: Tensor
    """Row of `conditions` of each cell (n_cells,)."""
    counts: Counts | None = None
    """Counts of the cells, for a count likelihood."""


class PairedCells:
    """The cells of one split, ready to be drawn from.

    Parameters
    ----------
    data
        The cells.
    perturbed
        The perturbed genes, in the order of the condition vector.
    contexts
        The contexts, in the order of the control pools.
    device
        Where batches go.
    counts
        Whether batches hold counts.
    """

    def __init__(
        self,
        data: TrainingData,
        perturbed: Sequence[str],
        contexts: Sequence[str],
        device: str = "cpu",
        *,
        counts: bool = False,
    ) -> None:
        self.data, self.device = data, device
        self.counts = data.counts if counts else None
        names, self.condition = np.unique(np.asarray(data.perturbation, dtype=str), return_inverse=True)
        column = {gene: i for i, gene in enumerate(perturbed)}
        self.conditions = np.zeros((len(names), len(perturbed)), dtype=np.float32)
        for row, name in enumerate(names):
            self.conditions[row, [column[gene] for gene in genes_of(name)]] = 1
        place = {context: i for i, context in enumerate(contexts)}
        self.context = np.array([place[context] for context in data.context], dtype=np.int64)
        # partners come from training cells; a context whose controls all validate lends those
        trained, every = self.control_pools(~data.is_val), self.control_pools()
        pools = [few if len(few) else more for few, more in zip(trained, every)]
        for pool, context in zip(pools, contexts):
            if not len(pool):
                raise MethodError(f"context {context!r} has no control cells in training; every method needs them")
        self._pool = np.concatenate(pools)
        self._pool_size = np.array([len(pool) for pool in pools])
        self._pool_start = np.concatenate([[0], np.cumsum(self._pool_size)[:-1]])
        if self.counts is not None:
            # a cell without any count on these genes says nothing; a size of 1 keeps its logarithm finite
            self.size = np.maximum(np.asarray(self.counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)

    def control_pools(self, among: np.ndarray | None = None) -> list[np.ndarray]:
        """Rows of the control cells of each context, all or those where `among` is true."""
        control = np.asarray(self.data.perturbation == CONTROL)
        if among is not None:
            control = control & among
        return [np.flatnonzero(control & (self.context == i)) for i in range(int(self.context.max()) + 1)]

    def draw_partners(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One random control cell of the same context for each row."""
        context = self.context[rows]
        return self._pool[self._pool_start[context] + rng.integers(self._pool_size[context])]

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """The cells `rows` with random control partners."""
        distinct, condition = np.unique(self.condition[rows], return_inverse=True)
        return Batch(
            dense_rows(self.data.X, np.concatenate([rows, self.draw_partners(rows, rng)]), self.device),
            torch.from_numpy(self.conditions[distinct]).to(self.device),
            torch.from_numpy(condition.astype(np.int64)).to(self.device),
            None if self.counts is None else gather_counts(self.counts, rows, self.size, self.device),
        )

    def normalising_factor(self, rows: np.ndarray) -> np.ndarray:
        """Factor from counts to normalised expression of each cell: target sum over library size (n_rows,)."""
        normalised = self.data.X[rows].astype(np.float64).expm1().sum(axis=1)
        return np.asarray(normalised, dtype=np.float64).ravel() / self.size[rows]
