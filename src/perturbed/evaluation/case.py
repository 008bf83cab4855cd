"""One test condition and one prediction of it: everything a metric may ask for, computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from perturbed.evaluation.differential import Differential, Moments, welch_t
from perturbed.evaluation.truth import ContextTruth, Truth, generator
from perturbed.evaluation.undefined import Undefined

ROUNDING = 1e-5
"""Predictions are float32: an effect below this share of the expression's own size is rounding, not effect."""
BATCH = 32
"""Cells per batch of the published cell-level metrics."""
SHIFTED = "control cells shifted by the predicted effect"
"""The note on distribution scores of methods that predict means only."""


@dataclass(frozen=True)
class Predicted:
    """What a method says of one condition: `mean` (n_genes,), and sampled `cells` (n, n_genes) where it has them."""

    mean: np.ndarray
    cells: np.ndarray | sparse.csr_matrix | None = None


@dataclass(frozen=True)
class Case:
    """One test condition beside its prediction.

    Parameters
    ----------
    truth
        The whole test set.
    index
        Position of the condition in it.
    prediction
        What a method predicts for it, genes in the order of `truth.genes`.
    """

    truth: Truth
    index: int
    prediction: Predicted

    @property
    def shared(self) -> ContextTruth:
        """Controls and perturbed mean of the context."""
        return self.truth.context(self.index)

    @property
    def observed(self) -> np.ndarray:
        """Mean of the test cells, x (n_genes,)."""
        return self.truth.mean[self.index]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted mean, x̂ (n_genes,)."""
        return self.prediction.mean

    @property
    def control(self) -> np.ndarray:
        """Mean of the training control cells, c (n_genes,)."""
        return self.shared.control

    @property
    def control_test(self) -> np.ndarray:
        """Mean of the held-out control cells, c_test (n_genes,)."""
        if self.shared.control_test is None:
            raise Undefined("no held-out control cells (control_test_fraction 0)")
        return self.shared.control_test

    @property
    def perturbed_mean(self) -> np.ndarray:
        """Mean over the training perturbations, m (n_genes,)."""
        if self.shared.perturbed_mean is None:
            raise Undefined("no perturbation in training")
        return self.shared.perturbed_mean

    @cached_property
    def effect(self) -> np.ndarray:
        """Observed effect, Δ = x − c (n_genes,)."""
        return self.observed - self.control

    @cached_property
    def predicted_effect(self) -> np.ndarray:
        """Predicted effect, Δ̂ = x̂ − c (n_genes,)."""
        return self.predicted - self.control

    def require_effect(self) -> np.ndarray:
        """The predicted effect, if there is any.

        Raises
        ------
        Undefined
            If it is nothing but the rounding of float32.
        """
        if root_mean_square(self.predicted_effect) <= ROUNDING * root_mean_square(self.control):
            raise Undefined("no effect predicted")
        return self.predicted_effect

    @cached_property
    def discrimination(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Observed effects of all peers and the predicted one, both 0 at the perturbed genes; row of the own one."""
        peers = self.truth.peers(self.index)
        effects = self.truth.mean[peers]
        effects -= self.control
        predicted = self.predicted_effect.copy()
        targets = self.truth.targets[self.index]
        effects[:, targets] = 0.0
        predicted[targets] = 0.0
        return effects, predicted, int(np.flatnonzero(peers == self.index)[0])

    # --- cells ------------------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> np.ndarray:
        """Pool rows of all test cells in a seeded random order."""
        names = self.truth.key(self.index)
        return generator(self.truth.spec.seed, "cells", *names).permutation(self.truth.rows[self.index])

    def drawn(self, n: int | None = None) -> np.ndarray:
        """Pool rows of at most `n` (and at most `max_cells`) drawn test cells."""
        return self.order[: self.truth.spec.max_cells][:n]

    def batches(self) -> tuple[list[sparse.csr_matrix], str]:
        """Test cells in random batches of 32, the rest dropped; a smaller condition is one batch, with a note."""
        whole = len(self.order) // BATCH
        if whole == 0:
            return [self.truth.pool.cells[self.order]], f"one batch of {len(self.order)} cells, fewer than {BATCH}"
        return [self.truth.pool.cells[self.order[i * BATCH : (i + 1) * BATCH]] for i in range(whole)], ""

    @cached_property
    def _stand_in(self) -> np.ndarray:
        """Pool rows of control cells in a random order of their own for this condition."""
        stream = generator(self.truth.spec.seed, "stand-in", *self.truth.key(self.index))
        return stream.permutation(self.shared.control_rows)

    @cached_property
    def _sample_order(self) -> np.ndarray:
        cells = self.prediction.cells
        assert cells is not None
        return generator(self.truth.spec.seed, "sampled", *self.truth.key(self.index)).permutation(cells.shape[0])

    @property
    def n_predicted_cells(self) -> int:
        """Cells there are to stand for the prediction."""
        return len(self._stand_in if self.prediction.cells is None else self._sample_order)

    @property
    def cells_note(self) -> str:
        """How the predicted cells were had, where the method gives none."""
        return SHIFTED if self.prediction.cells is None else ""

    def predicted_cells(self, n: int) -> np.ndarray:
        """At most `n` sampled cells, or exactly `n` control cells shifted by the predicted effect (n, n_genes).

        Where there are fewer control cells than `n`, they repeat.
        """
        if self.prediction.cells is None:
            return self.truth.pool.cells[np.resize(self._stand_in, n)].toarray() + self.predicted_effect
        chosen = self.prediction.cells[self._sample_order[:n]]
        return chosen if isinstance(chosen, np.ndarray) else np.asarray(chosen.toarray())

    def score_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """PCA scores of equally many observed and predicted cells, at most `max_cells`.

        Raises
        ------
        Undefined
            If there are fewer than two of either.
        """
        n = min(len(self.drawn()), self.n_predicted_cells)
        if n < 2:
            raise Undefined("fewer than 2 cells")
        pool = self.truth.pool
        observed = pool.scores[self.drawn(n)]
        if self.prediction.cells is None:
            return observed, pool.scores[self._stand_in[:n]] + self.predicted_effect @ pool.loadings
        return observed, pool.project(self.predicted_cells(n))

    # --- what only the truth decides --------------------------------------------------------------------------

    @cached_property
    def differential(self) -> Differential:
        """Welch's test of drawn test cells against equally many drawn control cells.

        Raises
        ------
        Undefined
            If there are fewer than two of either.
        """
        reference = self.shared.reference_rows
        n = min(len(self.drawn()), len(reference))
        if n < 2:
            raise Undefined("fewer than 2 cells for the differential test")
        cells = self.truth.pool.cells
        return welch_t(Moments.of(cells[self.drawn(n)]), Moments.of(cells[reference[:n]]))

    @cached_property
    def top_genes(self) -> np.ndarray:
        """Positions of the `n_top_de` most differential genes of the truth."""
        return self.differential.ranked()[: self.truth.spec.n_top_de]

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight per gene: |t| of the test cells against those of all other perturbations, min-max scaled, squared.

        Raises
        ------
        Undefined
            If there is no other perturbation, a single test cell, or no difference between genes.
        """
        own, others = self.truth.moments[self.index], self.truth.background(self.index)
        if own.n < 2:
            raise Undefined("fewer than 2 cells for the weights")
        size = np.abs(welch_t(own, others).t)
        finite = np.isfinite(size)
        if not finite.any():
            raise Undefined("no weights: every gene is constant within its group")
        size = np.where(finite, size, size[finite].max())  # constant in both groups and different: as the strongest
        spread = size.max() - size.min()
        if spread == 0:
            raise Undefined("no weights: all genes are equally differential")
        return ((size - size.min()) / spread) ** 2


def root_mean_square(values: np.ndarray) -> float:
    """``√mean(v²)``."""
    return float(np.sqrt(np.mean(np.square(values))))
