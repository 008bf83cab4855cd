"""Whether predicted cells are distributed as the observed ones are, in the PCA space of the training cells.

As many predicted as observed cells are compared, at most `max_cells`. A method that predicts means only is stood for
by training control cells shifted by Δ̂; the `reason` column says so.
"""

from __future__ import annotations

from perturbed.evaluation.case import Case
from perturbed.evaluation.distances import energy_distance
from perturbed.evaluation.distances import mmd_rbf as squared_mmd
from perturbed.evaluation.registry import Undefined, Value, metric


def _noted(value: float, case: Case) -> Value:
    return (value, case.cells_note) if case.cells_note else value


@metric(
    formula="2 mean‖x̂ᵢ − xⱼ‖ − mean_{i≠j}‖x̂ᵢ − x̂ⱼ‖ − mean_{i≠j}‖xᵢ − xⱼ‖",
    direction=-1,
    range="about [0, ∞), below 0 by chance",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="cells",
    topic="Distribution",
    source="scPerturb's E-distance with Euclidean distances, as a U-statistic",
)
def e_distance(case: Case) -> Value:
    """E-distance between predicted and observed cells."""
    observed, predicted = case.score_samples()
    return _noted(energy_distance(predicted, observed), case)


@metric(
    formula="mean_{i≠j} k(x̂ᵢ,x̂ⱼ) + mean_{i≠j} k(xᵢ,xⱼ) − 2 mean k(x̂ᵢ,xⱼ), k = exp(−‖a−b‖² / 2σ²), σ = median distance "
    "between observed cells of the context",
    direction=-1,
    range="about [0, 2], below 0 by chance",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="cells",
    topic="Distribution",
    source="Gretton et al. 2012, unbiased; the bandwidth never sees a prediction, so it is one for all methods",
)
def mmd_rbf(case: Case) -> Value:
    """Squared maximum mean discrepancy between predicted and observed cells, one Gaussian kernel."""
    observed, predicted = case.score_samples()
    bandwidth = case.truth.bandwidth(case.index)
    if bandwidth == 0:
        raise Undefined("more than half of the observed cells are equal")
    return _noted(squared_mmd(predicted, observed, bandwidth), case)
