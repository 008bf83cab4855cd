"""`shrunk_saturating`: denoised single effects, joined by their root sum of squares. The recipe to beat."""

from __future__ import annotations

import numpy as np

from perturbed.models.base import FitRun, TrainingData
from perturbed.models.baselines import NoParams
from perturbed.models.denoised import DenoisedEffects, summarise
from perturbed.models.shrinkage import measure_noise, shrink_low_rank, shrink_positive_part
from perturbed.names import CONTROL


def saturate(effects: np.ndarray) -> np.ndarray:
    """`√(Σ a²)` over the positive of the effects (n_perturbed, n_genes) minus the same over the negative.

    Of two that is `sign(a) √(a² + b²)` where the signs agree and `a + b` where they do not.
    """
    return np.asarray(np.linalg.norm(np.maximum(effects, 0), axis=0) - np.linalg.norm(np.minimum(effects, 0), axis=0))


class ShrunkSaturating(DenoisedEffects):
    """Noise-whitened effects, optimal singular-value shrinkage, empirical-Bayes residual, √(a² + b²).

    The effect of each perturbation against the control mean is divided, gene by gene, by the standard error of that
    difference (within-condition variance over the cells of both). The singular values of these z-scores are shrunk for
    unit noise (Gavish and Donoho 2017); what is left keeps, entry by entry, the share `max(1 − 1/z², 0)`. The
    effects of a combination's genes are joined by `saturate`. The control stays its mean.
    """

    Params = NoParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Shrink the effects of all training conditions.

        Raises
        ------
        MethodError
            If no condition has two cells that differ, or a context has no control cells.
        """
        means, count, row, conditions, cells = summarise(data)
        variance = measure_noise(cells, row, means, n_factors=0).variance
        self.check(data)
        profiles = means.copy()
        for context in sorted({context for _, context in conditions}):
            (control,) = [i for i, key in enumerate(conditions) if key == (CONTROL, context)]
            rows = [i for i, (p, where) in enumerate(conditions) if where == context and p != CONTROL]
            if not rows:
                continue
            error = np.sqrt(variance * (1 / count[rows, None] + 1 / count[control]))
            z = (means[rows] - means[control]) / error
            low = shrink_low_rank(z, 1.0)
            profiles[rows] = means[control] + (low + shrink_positive_part(z - low, np.ones(1))) * error
        self._set(profiles, conditions, tuple(data.genes))

    def _combine(self, perturbation: str) -> np.ndarray:
        return saturate(self._effect[self._members(perturbation)])
