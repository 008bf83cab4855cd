"""The numbers of paper A and its predecessor, as those compute them, with plain versions beside.

Both work on random batches of 32 cells of one condition, drop the rest, and average over the batches.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from perturbed.evaluation.case import BATCH, Case
from perturbed.evaluation.distances import mmd_multiscale
from perturbed.evaluation.registry import Undefined, Value, metric


def _with_note(values: list[float], note: str) -> Value:
    value = float(np.mean(values))
    return (value, note) if note else value


def _square_sum(batch: sparse.csr_matrix) -> float:
    return float(np.sum(batch.data.astype(np.float64) ** 2))


def _total(batch: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(batch.T @ np.ones(batch.shape[0]))  # float64 throughout; the matrix's own sum is float32


def _squared_error(batch: sparse.csr_matrix, predicted: np.ndarray) -> float:
    """``Σ (x̂ − x)²`` over cells and genes for one predicted mean, without making the cells dense."""
    return _square_sum(batch) - 2 * float(_total(batch) @ predicted) + batch.shape[0] * float(predicted @ predicted)


@metric(
    formula="mean over batches of √( mean (x̂ − x_cell)² / mean x_cell² )",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; 1 for an all-zero prediction",
    floor="no_change, mean_effect",
    ceiling="truth: the condition's own mean still differs from its cells (about 0.44 on the paper's data)",
    level="cells",
    topic="As published",
    source="paper A `RMSE` (facts A.6), after the predecessor's code",
)
def rmse_relative(case: Case) -> Value:
    """The paper's RMSE: error of the predicted mean against single cells, relative to the size of the expression."""
    batches, note = case.batches()
    values = []
    for batch in batches:
        size = _square_sum(batch)
        if size == 0:
            raise Undefined("all expression is zero")
        values.append(float(np.sqrt(_squared_error(batch, case.predicted) / size)))
    return _with_note(values, note)


@metric(
    formula="mean over batches of √( mean (x̂_cell − x_cell)² / mean x_cell² )",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; 1 for an all-zero prediction",
    floor="none",
    ceiling="√2 times that of rmse_relative for cells drawn from the truth and its mean",
    level="cells",
    topic="As published",
    source="the predecessor's `RMSE` with sampled cells (facts A.6)",
)
def rmse_relative_sampled(case: Case) -> Value:
    """The predecessor's RMSE between sampled and observed cells, paired at random, where a method samples cells."""
    if case.prediction.cells is None:
        raise Undefined("the method gives no sampled cells")
    batches, note = case.batches()
    sampled = case.predicted_cells(sum(batch.shape[0] for batch in batches))
    values = []
    for i, batch in enumerate(batches):
        cells = sampled[i * BATCH : i * BATCH + batch.shape[0]]
        size = _square_sum(batch)
        if len(cells) == batch.shape[0] and size > 0:
            values.append(float(np.sqrt(np.sum((cells - batch.toarray()) ** 2) / size)))
    if not values:
        raise Undefined("too few sampled cells for one batch, or all expression is zero")
    return _with_note(values, note)


@metric(
    formula="mean over batches of max(0, 1 − Σ_g (x̂ − x̄_batch)² / Σ_g (x̂ − mean_g x̂)²)",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="none; near 1 for no_change",
    floor="no_change",
    ceiling="truth",
    level="cells",
    topic="As published",
    source="the predecessor's `R2` (facts A.6): prediction first, clipped at 0 as there; use r2 for anything else",
)
def r2_published(case: Case) -> Value:
    """The predecessor's R², with the prediction in the place of the truth; the one metric that is clipped."""
    batches, note = case.batches()
    spread = float(np.sum((case.predicted - case.predicted.mean()) ** 2))
    if spread == 0:
        raise Undefined("the predicted mean is constant over genes")
    errors = [float(np.sum((case.predicted - _total(batch) / batch.shape[0]) ** 2)) for batch in batches]
    return _with_note([max(0.0, 1 - error / spread) for error in errors], note)


@metric(
    formula="mean over batches of 1 − Σ (x̂ − x_cell)² / Σ (x_cell − mean x_cell)², sums over cells and genes",
    direction=1,
    range="(−∞, 1]",
    perfect=1.0,
    chance="none; see the floor",
    floor="no_change",
    ceiling="truth",
    level="cells",
    topic="As published",
    source="paper A, Table 14 `cell R2` (its aggregation is not published; this is the flat one), unclipped",
)
def r2_cells(case: Case) -> Value:
    """Share of the variance of single cells, over cells and genes at once, that the predicted mean explains."""
    batches, note = case.batches()
    values = []
    for batch in batches:
        spread = _square_sum(batch) - float(_total(batch).sum()) ** 2 / np.prod(batch.shape)
        if spread <= 0:
            raise Undefined("the observed cells are constant")
        values.append(1 - _squared_error(batch, case.predicted) / float(spread))
    return _with_note(values, note)


@metric(
    formula="mean over batches of Σ_k [mean k(x̂,x̂) + mean k(x,x) − 2 mean k(x̂,x)], k = exp(−‖a−b‖² / (1000·2^(i−5))), "
    "i = 0…9",
    direction=-1,
    range="[0, 20)",
    perfect=0.0,
    chance="none; above 0 even for cells of the same condition, since the diagonal counts",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="cells",
    topic="As published",
    source="the predecessor's `MMD` (facts A.6): 10 Gaussian kernels, widths 1000·2^(−5…4), V-statistic, all genes",
)
def mmd_published(case: Case) -> Value:
    """The predecessor's MMD between predicted and observed cells, batch by batch."""
    batches, note = case.batches()
    n = sum(batch.shape[0] for batch in batches)
    cells = case.predicted_cells(n)
    repeats = f"{case.n_predicted_cells} cells repeated" if len(cells) > case.n_predicted_cells else ""
    values = []
    for i, batch in enumerate(batches):
        sampled = cells[i * BATCH : i * BATCH + batch.shape[0]]
        if len(sampled) == batch.shape[0]:
            values.append(mmd_multiscale(sampled, batch.toarray()))
    if not values:
        raise Undefined("too few predicted cells for one batch")
    return _with_note(values, "; ".join(filter(None, (case.cells_note, repeats, note))))
