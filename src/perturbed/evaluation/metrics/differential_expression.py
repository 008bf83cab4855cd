"""Whether the prediction finds the genes that one fixed test calls differential in the truth.

The test is Welch's t of drawn test cells against equally many drawn control cells (held-out ones where the split has
them), Benjamini–Hochberg at 5 %. Methods predict means, so the predicted side is ranked by |Δ̂| for all of them alike:
no predicted p-values, which would reward a method for the number of cells it samples.
"""

from __future__ import annotations

import numpy as np

from perturbed.evaluation.case import Case
from perturbed.evaluation.differential import average_precision
from perturbed.evaluation.registry import Undefined, metric

FDR = 0.05
CAP = 100


def _significant(case: Case) -> np.ndarray:
    """Positions of the significant genes of the truth, from strongest to weakest effect."""
    found = np.flatnonzero(case.differential.significant(FDR))
    if len(found) == 0:
        raise Undefined("no gene is significant in the truth")
    return found[np.argsort(-np.abs(case.differential.effect[found]), kind="stable")]


@metric(
    formula="|top_N(|Δ|, significant) ∩ top_N(|Δ̂|)| / N, N = min(number significant, 100)",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="N / number of genes",
    floor="mean_effect (no_change ranks nothing)",
    ceiling="technical_duplicate",
    level="cells",
    topic="Differential expression",
    source="cell-eval `overlap_at_N` (which ranks predictions by their own test, and has no cap)",
)
def de_overlap(case: Case) -> float:
    """Share of the strongest significant genes that are among equally many strongest predicted ones."""
    significant = _significant(case)
    n = min(len(significant), CAP)
    predicted = np.argsort(-np.abs(case.require_effect()), kind="stable")[:n]
    return float(len(np.intersect1d(significant[:n], predicted)) / n)


@metric(
    formula="mean over significant genes of 1[sign Δ̂ = sign Δ], a predicted 0 counting half",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="0.5",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate",
    level="cells",
    topic="Differential expression",
    source="cell-eval `de_direction_match` (over genes significant on both sides there)",
)
def de_direction(case: Case) -> float:
    """Share of the significant genes whose predicted change has the observed sign."""
    significant = _significant(case)
    predicted = case.require_effect()[significant]
    agreement = np.sign(predicted) * np.sign(case.differential.effect[significant])
    return float(np.mean((agreement + 1) / 2))


@metric(
    formula="Σ_k (R_k − R_{k−1}) P_k, label: significant in the truth, score: |Δ̂|, ties as one step",
    direction=1,
    range="(0, 1]",
    perfect=1.0,
    chance="share of significant genes",
    floor="mean_effect (no_change ranks nothing)",
    ceiling="technical_duplicate",
    level="cells",
    topic="Differential expression",
    source="cell-eval `pr_auc` (which scores by predicted p-values)",
)
def de_pr_auc(case: Case) -> float:
    """Area under the precision-recall curve of finding the significant genes by the size of the predicted change."""
    labels = case.differential.significant(FDR)
    _significant(case)
    if labels.all():
        raise Undefined("every gene is significant in the truth")
    return average_precision(labels, np.abs(case.require_effect()))
