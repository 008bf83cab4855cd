"""`shrunk_interaction`: a linear structural model of populations, every part shrunk by what the data say of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from perturbed.config import Section
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.denoised import DenoisedEffects, summarise
from perturbed.models.interaction import (
    Interaction,
    curvature,
    fit_interaction,
    product_kernel,
    saturate_norm,
    shared_kernel,
)
from perturbed.models.shrinkage import denoise, measure_noise
from perturbed.names import genes_of


class ShrunkInteractionParams(Section):
    """Hyper-parameters."""

    saturation: float = Field(0.066, ge=0)
    """Prior sub-additivity: the sum s of effects is divided by 1 + saturation · ‖s‖ / (root mean square of the single
    effects' norms). 0 makes unseen combinations additive."""
    whitening: float = Field(0.5, ge=0, le=1)
    """Power of the noise covariance in which singular values are shrunk: 1 full whitening, 0 none."""
    n_noise_factors: int = Field(20, ge=0)
    """Correlated directions of the within-condition noise (cell cycle, depth) kept at most; 0 takes genes as
    independent."""
    n_rounds: int = Field(5, ge=1)
    """Turns between the low-rank and the gene-wise part of the denoising."""
    min_combinations: int = Field(8, ge=3)
    """Training combinations, all of whose genes were perturbed alone too, below which no interaction is learnt."""


class ShrunkInteraction(DenoisedEffects):
    """Shrunk profiles, sub-additive prior, learnt and shrunk interaction; see `docs/methods.md`."""

    Params = ShrunkInteractionParams
    params: ShrunkInteractionParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Denoise all training conditions jointly, control among them, then learn what combinations add.

        Raises
        ------
        MethodError
            If no condition has two cells that differ, or a context has no control cells.
        """
        self.check(data)
        means, count, row, conditions, cells = summarise(data)
        noise = measure_noise(cells, row, means, self.params.n_noise_factors)
        centre = np.zeros_like(means)
        for context in {context for _, context in conditions}:
            rows = [i for i, (_, where) in enumerate(conditions) if where == context]
            centre[rows] = means[rows].mean(axis=0)
        shrunk = denoise(
            means - centre, count, noise, whitening=self.params.whitening, n_rounds=self.params.n_rounds
        )
        self._set(centre + shrunk, conditions, tuple(data.genes))
        self._learn(means, conditions)

    def _learn(self, means: np.ndarray, conditions: list[tuple[str, str]]) -> None:
        background = dict(zip(self._contexts, self._background))
        seen: dict[str, list[np.ndarray]] = {}
        for mean, (perturbation, context) in zip(means, conditions):
            seen.setdefault(perturbation, []).append(mean - background[context])
        names = [name for name in self._names if len(genes_of(name)) > 1 and all(g in self._row for g in genes_of(name))]
        self._learnt: tuple[str, ...] = ()
        self._interaction = Interaction(np.zeros(3), np.zeros(2), np.zeros((0, len(self._genes))))
        if len(names) < self.params.min_combinations:
            return
        members = [self._members(name) for name in names]
        prior = np.stack([self._prior(rows) for rows in members])
        denoised = self._effect[[self._row[name] for name in names]] - prior
        observed = np.stack([np.mean(seen[name], axis=0) for name in names]) - prior
        terms = np.stack([curvature(self._effect[rows]) for rows in members])
        similarity = self._similarity()
        kernels = np.stack([shared_kernel(members, members), product_kernel(members, members, similarity)])
        self._learnt, self._interaction = tuple(names), fit_interaction(terms, kernels, denoised, observed)

    def _prior(self, rows: np.ndarray) -> np.ndarray:
        singles = [i for name, i in self._row.items() if len(genes_of(name)) == 1]
        unit = float(np.sqrt((self._effect[singles] ** 2).sum(axis=1).mean()))
        return saturate_norm(self._effect[rows].sum(axis=0), self.params.saturation, unit)

    def _similarity(self) -> np.ndarray:
        norm = np.linalg.norm(self._effect, axis=1)
        unit = self._effect / np.where(norm > 0, norm, 1.0)[:, None]
        return np.asarray(unit @ unit.T)

    def _combine(self, perturbation: str) -> np.ndarray:
        rows = self._members(perturbation)
        effect = self._prior(rows) + self._interaction.slope @ curvature(self._effect[rows])
        if not self._learnt:
            return np.asarray(effect)
        members = [self._members(name) for name in self._learnt]
        shared, bilinear = self._interaction.share
        kernel = shared * shared_kernel([rows], members) + bilinear * product_kernel(
            [rows], members, self._similarity()
        )
        return np.asarray(effect + (kernel @ self._interaction.weights)[0])

    def state(self) -> dict[str, Any]:
        """Backgrounds, effects and the interaction, float64."""
        fitted = self._interaction
        return super().state() | {"slope": fitted.slope, "share": fitted.share, "weights": fitted.weights}

    def meta(self) -> dict[str, Any]:
        """Names, and the combinations the interaction was learnt from."""
        return super().meta() | {"learnt": self._learnt}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore what `state` and `meta` returned."""
        super().load_state(state, meta)
        self._learnt = tuple(meta["learnt"])
        self._interaction = Interaction(*(np.asarray(state[key]) for key in ("slope", "share", "weights")))
