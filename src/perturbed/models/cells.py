"""Training cells as batches with control partners, for models that compare a perturbed cell with a control cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbed.data.streaming import StreamedMatrix, batch_by_windows
from perturbed.errors import MethodError
from perturbed.models.base import TrainingData
from perturbed.models.nn.likelihoods import Counts, gather_counts
from perturbed.models.partners import Partners, background_coordinates, nearest_controls
from perturbed.names import CONTROL, genes_of
from perturbed.resident import ResidentCells

if TYPE_CHECKING:
    from perturbed.training import Batches


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
    perturbed_share: float = 1.0
    """What the perturbed cells of the whole batch are to each of these cells' own: their part of the whole batch over
    their part of these cells; 1 where these are the whole batch. Keeps averages over perturbed cells those of the
    batch when it is shared among processes."""


def batch_by_blocks(
    labels: np.ndarray, block: int, rows: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of one epoch, filled with random blocks of cells of one label.

    For losses that compare the cells of a condition with each other; bind the first two arguments to get a
    `perturbed.training.Batches`.

    Parameters
    ----------
    labels
        Label of every cell of the data, such as its condition (n_cells,).
    block
        Cells of a block; the last block of a label holds what remains.
    rows, batch_size, rng
        As the training loop hands them over.
    """
    shuffled = rng.permutation(rows)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, start, n = np.unique(labels[by_label], return_index=True, return_counts=True)
    blocks = [part for i, k in zip(start, n) for part in np.split(by_label[i : i + k], range(block, k, block))]
    order = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


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
    partners
        `random`: any training control cell of the context. `matched_pca`, `matched_cycle`: one of the nearest, see
        `perturbed.models.partners`.
    """

    def __init__(
        self,
        data: TrainingData,
        perturbed: Sequence[str],
        contexts: Sequence[str],
        device: str = "cpu",
        *,
        counts: bool = False,
        partners: Partners = "random",
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
        self._nearest = None if partners == "random" else self._match(partners, pools)
        self.resident = ResidentCells(data.X, device)
        for matrix in (data.X, self.counts):
            if isinstance(matrix, StreamedMatrix):
                matrix.pin(self._pool)  # every batch draws from them
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
        """One control cell of the same context for each row: any, or one of its nearest where partners are matched."""
        if self._nearest is not None:
            chosen = rng.integers(self._n_nearest[rows])
            return self._nearest[rows, chosen]
        context = self.context[rows]
        return self._pool[self._pool_start[context] + rng.integers(self._pool_size[context])]

    def _match(self, partners: Partners, pools: list[np.ndarray]) -> np.ndarray:
        """Nearest control cells of every cell; rows of contexts with few of them are filled up with repeats."""
        coordinates = background_coordinates(self.data, partners)
        found = [nearest_controls(coordinates, np.flatnonzero(self.context == i), pool) for i, pool in enumerate(pools)]
        width = max(part.shape[1] for part in found)
        nearest = np.empty((len(self.context), width), dtype=np.int64)
        self._n_nearest = np.empty(len(self.context), dtype=np.int64)
        for i, part in enumerate(found):
            rows = np.flatnonzero(self.context == i)
            nearest[rows] = part[:, np.arange(width) % part.shape[1]]
            self._n_nearest[rows] = part.shape[1]
        return nearest

    def batches(self) -> Batches | None:
        """The order of training that suits where the cells are; None where they are in memory."""
        on_disk: Any = tuple(matrix for matrix in (self.data.X, self.counts) if isinstance(matrix, StreamedMatrix))
        return partial(batch_by_windows, on_disk) if on_disk else None

    def batch(self, rows: np.ndarray, rng: np.random.Generator, share: slice = slice(None)) -> Batch:
        """The cells `rows` with control partners drawn anew; of these, those of a process's `share`."""
        partners = self.draw_partners(rows, rng)[share]
        is_perturbed = np.asarray(self.conditions.any(axis=1))[self.condition[rows]]
        n_all, every = len(rows), int(is_perturbed.sum())
        rows = rows[share]
        distinct, condition = np.unique(self.condition[rows], return_inverse=True)
        return Batch(
            self.resident.take(np.concatenate([rows, partners])),
            torch.from_numpy(self.conditions[distinct]).to(self.device),
            torch.from_numpy(condition.astype(np.int64)).to(self.device),
            None if self.counts is None else gather_counts(self.counts, rows, self.size, self.device),
            max(int(is_perturbed[share].sum()), 1) * n_all / (len(rows) * max(every, 1)),
        )

    def normalising_factor(self, rows: np.ndarray) -> np.ndarray:
        """Factor from counts to normalised expression of each cell: target sum over library size (n_rows,)."""
        return normalising_factor(self.data.X[rows], self.size[rows])


def normalising_factor(X: sparse.csr_matrix, size: np.ndarray) -> np.ndarray:
    """Target sum over library size of cells, from log-normalised expression `X` and counts that sum to `size`."""
    normalised = X.astype(np.float64).expm1().sum(axis=1)
    return np.asarray(normalised, dtype=np.float64).ravel() / size
