"""Whether a prediction is nearer to its own observed effect than to those of other perturbations."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from perturbed.evaluation.case import Case
from perturbed.evaluation.registry import Undefined, metric


def mid_rank_score(distances: np.ndarray, own: int) -> float:
    """``1 − r / (N − 1)`` with r the number of other entries that are nearer than the own one, ties counting half.

    1 where the own entry is the nearest, 0 where it is the farthest, 0.5 where all tie.

    Raises
    ------
    Undefined
        If there is no other entry.
    """
    others = np.delete(distances, own)
    if len(others) == 0:
        raise Undefined("no other test perturbation in this context to tell it from")
    nearer = np.sum(others < distances[own]) + 0.5 * np.sum(others == distances[own])
    return float(1 - nearer / len(others))


@metric(
    formula="1 − r / (N − 1), r = #{j: ‖Δ̂_p − Δ_j‖₁ < ‖Δ̂_p − Δ_p‖₁} with ties counting half, perturbed genes left out",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="0.5",
    floor="mean_effect",
    ceiling="technical_duplicate",
    level="mean",
    topic="Ranking",
    source="cell-eval `discrimination_score_l1` (1 − r / N there, ties by sort order); Virtual Cell Challenge",
)
def pds_l1(case: Case) -> float:
    """Perturbation discrimination score: rank of the own observed effect among all by L1 distance to the prediction."""
    effects, predicted, own = case.discrimination
    return mid_rank_score(cdist(predicted[None], effects, "cityblock")[0], own)


@metric(
    formula="1 − r / (N − 1), r as in pds_l1 with the distance 1 − cos(Δ̂_p, Δ_j)",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="0.5",
    floor="mean_effect (no_change has no direction)",
    ceiling="technical_duplicate",
    level="mean",
    topic="Ranking",
    source="cell-eval `discrimination_score_cosine` (1 − r / N there, ties by sort order)",
)
def pds_cosine(case: Case) -> float:
    """Perturbation discrimination score by cosine: the direction alone has to tell the perturbations apart."""
    case.require_effect()
    effects, predicted, own = case.discrimination
    norms = np.linalg.norm(effects, axis=1) * np.linalg.norm(predicted)
    if (norms == 0).any():
        raise Undefined("an effect is zero outside the perturbed genes")
    return mid_rank_score(1 - (effects @ predicted) / norms, own)


@metric(
    formula="#{j ≠ p: ‖x̂_p − x_j‖₂ > ‖x̂_p − x_p‖₂} / (N − 1), ties counting half",
    direction=1,
    range="[0, 1]",
    perfect=1.0,
    chance="0.5",
    floor="mean_effect",
    ceiling="technical_duplicate",
    level="mean",
    topic="Ranking",
    source="Systema (Nature Biotechnology 2025), over test perturbations",
)
def centroid_accuracy(case: Case) -> float:
    """Share of other observed means that lie farther from the prediction than its own, all genes, Euclidean."""
    peers = case.truth.peers(case.index)
    distances = cdist(case.predicted[None], case.truth.mean[peers], "sqeuclidean")[0]
    return mid_rank_score(distances, int(np.flatnonzero(peers == case.index)[0]))
