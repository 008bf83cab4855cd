"""How far the predicted mean is from the observed one."""

from __future__ import annotations

import numpy as np

from perturbed.evaluation.case import Case, root_mean_square
from perturbed.evaluation.registry import Undefined, metric


def residual_r2(observed: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Coefficient of determination ``1 − Σw(x − x̂)² / Σw(x − x̄_w)²``, in general negative for a bad prediction.

    Raises
    ------
    Undefined
        If the observed values are constant.
    """
    w = np.ones_like(observed) if weights is None else weights
    spread = np.sum(w * (observed - np.average(observed, weights=w)) ** 2)
    if len(observed) < 2 or spread == 0:
        raise Undefined("the observed values are constant")
    return float(1 - np.sum(w * (observed - predicted) ** 2) / spread)


@metric(
    formula="√mean_g (x̂ − x)²",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="mean",
    topic="Error",
    source="plain definition",
    to_full_n="root_half",
)
def rmse(case: Case) -> float:
    """Root mean squared error of the mean expression, over genes."""
    return root_mean_square(case.predicted - case.observed)


@metric(
    formula="mean_g |x̂ − x|",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="mean",
    topic="Error",
    source="plain definition; agrees with cell-eval `mae`",
    to_full_n="root_half",
)
def mae(case: Case) -> float:
    """Mean absolute error of the mean expression, over genes."""
    return float(np.mean(np.abs(case.predicted - case.observed)))


@metric(
    formula="‖Δ̂ − Δ‖₂ = ‖x̂ − x‖₂",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate; noise_free where simulated",
    level="mean",
    topic="Error",
    source="Ahlmann-Eltze et al. 2025 (on all genes of the split)",
    to_full_n="root_half",
)
def l2_delta(case: Case) -> float:
    """Euclidean distance of predicted and observed effect; the control cancels."""
    return float(np.linalg.norm(case.predicted_effect - case.effect))


@metric(
    formula="Σ_g w (x̂ − x)² / Σ_g w",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; see the floor",
    floor="mean_effect",
    ceiling="technical_duplicate, interpolated_duplicate",
    level="mean",
    topic="Error",
    source="Mejia et al. 2025; cellsimbench",
    to_full_n="half",
)
def wmse(case: Case) -> float:
    """Mean squared error with genes weighted by how specific they are to this perturbation in the truth."""
    return float(np.average((case.predicted - case.observed) ** 2, weights=case.weights))


@metric(
    formula="1 − Σ_g (x − x̂)² / Σ_g (x − mean_g x)²",
    direction=1,
    range="(−∞, 1]",
    perfect=1.0,
    chance="none; near 1 for no_change, since genes differ more than perturbations do",
    floor="no_change",
    ceiling="technical_duplicate",
    level="mean",
    topic="Error",
    source="plain definition, truth as the reference, unclipped",
    to_full_n="half_residual",
)
def r2(case: Case) -> float:
    """Share of the variance between genes of the observed mean that the predicted mean explains."""
    return residual_r2(case.observed, case.predicted)


@metric(
    formula="√mean (x̂ − x)² over the top differential genes",
    direction=-1,
    range="[0, ∞)",
    perfect=0.0,
    chance="none; see the floor",
    floor="no_change, mean_effect",
    ceiling="technical_duplicate",
    level="cells",
    topic="Error",
    source="paper A, Fig. 10–11 (top 20 genes)",
    to_full_n="root_half",
)
def rmse_top_de(case: Case) -> float:
    """Root mean squared error on the genes that change most."""
    top = case.top_genes
    return root_mean_square(case.predicted[top] - case.observed[top])


@metric(
    formula="1 − Σ (x − x̂)² / Σ (x − mean x)² over the top differential genes",
    direction=1,
    range="(−∞, 1]",
    perfect=1.0,
    chance="none; see the floor",
    floor="no_change",
    ceiling="technical_duplicate",
    level="cells",
    topic="Error",
    source="paper A, Fig. 10–11 (top 20 genes), unclipped",
    to_full_n="half_residual",
)
def r2_top_de(case: Case) -> float:
    """Coefficient of determination on the genes that change most."""
    top = case.top_genes
    return residual_r2(case.observed[top], case.predicted[top])
