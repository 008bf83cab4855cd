"""Whether the predicted effect points where the observed one does."""

from __future__ import annotations

import numpy as np

from perturbed.evaluation.case import ROUNDING, Case, root_mean_square
from perturbed.evaluation.metrics.error import residual_r2
from perturbed.evaluation.registry import Undefined, metric


def correlate(observed: np.ndarray, predicted: np.ndarray, scale: float) -> float:
    """Pearson correlation over genes.

    Parameters
    ----------
    observed, predicted
        Values per gene (n_genes,).
    scale
        Size of the expression that the values are differences of; a vector whose spread is below the rounding of
        float32 at this size is constant.

    Raises
    ------
    Undefined
        If one of the two is constant.
    """
    a, b = observed - observed.mean(), predicted - predicted.mean()
    for values, name in ((a, "observed"), (b, "predicted")):
        if root_mean_square(values) <= ROUNDING * scale:
            raise Undefined(f"the {name} effect is constant over genes")
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@metric(
    formula="corr_g(x − c, x̂ − c)",
    direction=1,
    range="[−1, 1]",
    perfect=1.0,
    chance="0, but a noisy control that both sides share lifts it",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate; truth",
    level="mean",
    topic="Direction",
    source="agrees with cell-eval `pearson_delta` when the predicted control is the real one",
    to_full_n="spearman_brown",
)
def pearson_delta_ctrl(case: Case) -> float:
    """Correlation of observed and predicted effect, both against the same training control cells."""
    return correlate(case.effect, case.predicted_effect, root_mean_square(case.control))


@metric(
    formula="corr_g(x − c_test, x̂ − c)",
    direction=1,
    range="[−1, 1]",
    perfect=1.0,
    chance="0",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate; truth",
    level="mean",
    topic="Direction",
    source="this package; needs control_test_fraction > 0",
    to_full_n="variance_components",
)
def pearson_delta_ctrl_disjoint(case: Case) -> float:
    """Correlation of effects against disjoint controls, held-out cells for the truth, training ones for the prediction.

    No control cell stands on both sides, so the noise of the control cannot make them agree.
    """
    observed = case.observed - case.control_test
    return correlate(observed, case.predicted_effect, root_mean_square(case.control))


@metric(
    formula="corr_g(x − m, x̂ − m)",
    direction=1,
    range="[−1, 1]",
    perfect=1.0,
    chance="0, but a noisy perturbed mean that both sides share lifts it",
    floor="no_change (mean_effect has no direction)",
    ceiling="technical_duplicate; truth",
    level="mean",
    topic="Direction",
    source="Systema (Nature Biotechnology 2025); cellsimbench",
    to_full_n="spearman_brown",
)
def pearson_delta_pert(case: Case) -> float:
    """Correlation of what sets a perturbation apart from the mean training perturbation, observed and predicted."""
    mean = case.perturbed_mean
    return correlate(case.observed - mean, case.predicted - mean, root_mean_square(case.control))


@metric(
    formula="corr(x − c, x̂ − c) over the top differential genes",
    direction=1,
    range="[−1, 1]",
    perfect=1.0,
    chance="0, but a noisy control that both sides share lifts it",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate; truth",
    level="cells",
    topic="Direction",
    source="paper A, Fig. 10–11 (top 20 genes); GEARS",
    to_full_n="spearman_brown",
)
def pearson_delta_ctrl_top_de(case: Case) -> float:
    """Correlation of observed and predicted effect on the genes that change most."""
    top = case.top_genes
    return correlate(case.effect[top], case.predicted_effect[top], root_mean_square(case.control))


@metric(
    formula="Δ·Δ̂ / (‖Δ‖ ‖Δ̂‖)",
    direction=1,
    range="[−1, 1]",
    perfect=1.0,
    chance="0, but a noisy control that both sides share lifts it",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate; truth",
    level="mean",
    topic="Direction",
    source="PerturBench (on log-normalised means)",
    to_full_n="spearman_brown",
)
def cosine(case: Case) -> float:
    """Cosine of the angle between observed and predicted effect, against the training control cells."""
    predicted = case.require_effect()
    if not case.effect.any():
        raise Undefined("no observed effect")
    return float(case.effect @ predicted / (np.linalg.norm(case.effect) * np.linalg.norm(predicted)))


@metric(
    formula="1 − Σ_g w (y − ŷ)² / Σ_g w (y − ȳ_w)², y = x − m, ŷ = x̂ − m",
    direction=1,
    range="(−∞, 1]",
    perfect=1.0,
    chance="≤ 0; about 0 for mean_effect",
    floor="mean_effect",
    ceiling="technical_duplicate, interpolated_duplicate",
    level="mean",
    topic="Direction",
    source="Mejia et al. 2025; cellsimbench",
    to_full_n="half_residual",
)
def r2_delta_weighted(case: Case) -> float:
    """Weighted share of a perturbation's own effect (against the training perturbed mean) that is explained."""
    mean = case.perturbed_mean
    return residual_r2(case.observed - mean, case.predicted - mean, case.weights)
