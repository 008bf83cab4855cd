"""Whether predictions are as large, and as different from each other, as the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perturbed.evaluation.case import Case
from perturbed.evaluation.registry import Undefined, Value, metric


@metric(
    formula="‖Δ̂‖₂ / ‖Δ‖₂",
    direction=0,
    range="[0, ∞)",
    perfect=1.0,
    chance="none; 0 for no_change",
    floor="no_change",
    ceiling="truth; noise_free lies below 1, since the noise of the observed mean adds to ‖Δ‖",
    level="mean",
    topic="Spread",
    source="this package",
)
def effect_size_ratio(case: Case) -> float:
    """Size of the predicted effect over that of the observed one."""
    size = float(np.linalg.norm(case.effect))
    if size == 0:
        raise Undefined("no observed effect")
    return float(np.linalg.norm(case.predicted_effect)) / size


@metric(
    formula="Σ_g Var_p x̂ / Σ_g Var_p x over the predicted test perturbations of a context",
    direction=0,
    range="[0, ∞)",
    perfect=1.0,
    chance="0 for any prediction that is the same for all perturbations",
    floor="mean_effect",
    ceiling="truth; noise_free lies below 1, since the noise of the observed means adds to their variance",
    level="set",
    topic="Spread",
    source="this package (the mode-collapse ratio)",
)
def spread_ratio(cases: Sequence[Case]) -> Value:
    """Variance between predicted perturbations over that between observed ones; 0 is mode collapse."""
    if len(cases) < 2:
        raise Undefined("fewer than 2 predicted perturbations in this context")
    observed = np.var([case.observed for case in cases], axis=0).sum()
    if observed == 0:
        raise Undefined("the observed means do not differ")
    return float(np.var([case.predicted for case in cases], axis=0).sum() / observed)
