"""`shrunk_interaction`: a linear structural model of populations, each part shrunk by its measured noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat

from perturbed.config import Section
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.denoised import DenoisedEffects, summarise
from perturbed.models.interaction import (
    Interaction,
    add_on_link,
    curvature,
    fit_interaction,
    product_kernel,
    saturation,
    shared_kernel,
)
from perturbed.models.shrinkage import LEVELS, denoise, measure_noise
from perturbed.names import CONTROL, genes_of

N_TERMS = 5


class ShrunkInteractionParams(Section):
    """Hyper-parameters."""

    saturation: float = Field(0.2, ge=0, lt=1)
    """Prior sub-additivity γ: the sum s of effects is multiplied by (‖s‖ / unit)^−γ, where the unit is the root mean
    square of the single effects' norms. 0 makes unseen combinations additive. Combinations in training take over."""
    link_offset: float = Field(0.1, gt=0, le=1)
    """δ of the link log(eᵐ − 1 + δ) on which effects add: towards 0 in the log of expression, where they multiply it;
    at 1 in log-normalised expression m itself. δ keeps genes that are nearly off from large steps."""
    prior_count: float = Field(16.0, gt=0)
    """How many combinations in training weigh as much as the prior: with n of them the exponent is γ times this over
    this plus n."""
    whitening: float = Field(0.5, ge=0, le=1)
    """Power of the noise covariance in which singular values are shrunk: 1 full whitening, 0 none."""
    n_noise_factors: int = Field(20, ge=0)
    """Correlated directions of the within-condition noise (cell cycle, depth) kept at most; 0 takes genes as
    independent."""
    n_rounds: int = Field(5, ge=1)
    """Turns between the low-rank and the gene-wise part of the denoising."""
    noise_levels: tuple[PositiveFloat, ...] = Field(LEVELS, min_length=1)
    """Noise levels, in units of the measured one, that the denoising averages over."""
    denoise_control: bool = True
    """Whether the control is denoised with the perturbations, or stays the mean of its cells."""
    learn_interaction: bool = True
    """Whether combinations in training teach the interaction, or the prior stands alone."""


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
            means - centre,
            count,
            noise,
            whitening=self.params.whitening,
            n_rounds=self.params.n_rounds,
            levels=self.params.noise_levels,
        )
        profiles = centre + shrunk
        if not self.params.denoise_control:
            control = [i for i, (perturbation, _) in enumerate(conditions) if perturbation == CONTROL]
            profiles[control] = means[control]
        self._set(profiles, conditions, tuple(data.genes))
        self._learn()

    def _learn(self) -> None:
        """Fit the interaction to the training combinations all of whose genes were perturbed alone too."""
        self._learnt = tuple(
            name
            for name in self._names
            if self.params.learn_interaction
            and len(genes_of(name)) > 1
            and all(gene in self._row for gene in genes_of(name))
        )
        n, count = len(self._learnt), self.params.prior_count
        self._exponent = self.params.saturation * count / (count + n)
        self._prepare()
        if not n:
            self._interaction = Interaction(np.zeros(N_TERMS), np.zeros(2), np.zeros((2, 0, len(self._genes))))
            return
        effect = self._effect[[self._row[name] for name in self._learnt]]
        prior = np.stack([self._prior(rows) for rows in self._combinations])
        terms = np.stack([self._terms(rows) for rows in self._combinations])
        kernels = np.stack([self._kernels(rows) for rows in self._combinations], axis=1)
        self._interaction = fit_interaction(terms, kernels, effect - prior)

    def _prepare(self) -> None:
        """Everything that effects and names decide."""
        norm = np.linalg.norm(self._effect, axis=1)
        unit = self._effect / np.where(norm > 0, norm, 1.0)[:, None]
        self._similarity = unit @ unit.T
        single = np.array([len(genes_of(name)) == 1 for name in self._names], dtype=bool)
        size = float(np.sqrt((norm[single] ** 2).mean())) if single.any() else 0.0
        self._unit = size if size > 0 else 1.0
        self._combinations = [self._members(name) for name in self._learnt]

    def _prior(self, rows: np.ndarray) -> np.ndarray:
        effects = self._effect[rows]
        factor = saturation(effects.sum(axis=0), self._exponent, self._unit)
        return add_on_link(effects, self._background.mean(axis=0), self.params.link_offset, factor)

    def _terms(self, rows: np.ndarray) -> np.ndarray:
        return curvature(self._effect[rows], self._background.mean(axis=0))

    def _kernels(self, rows: np.ndarray) -> np.ndarray:
        """Values of both kernels against the learnt combinations (2, n)."""
        shared = shared_kernel([rows], self._combinations)
        return np.vstack([shared, product_kernel([rows], self._combinations, self._similarity)])

    def _combine(self, perturbation: str) -> np.ndarray:
        rows = self._members(perturbation)
        effect = self._prior(rows)
        if self._learnt:
            effect = effect + self._interaction.predict(self._terms(rows), self._kernels(rows))
        return np.asarray(effect)

    def state(self) -> dict[str, Any]:
        """Backgrounds, effects and the interaction, float64."""
        fitted = self._interaction
        return super().state() | {
            "exponent": np.array(self._exponent),
            "slope": fitted.slope,
            "share": fitted.share,
            "weights": fitted.weights,
        }

    def meta(self) -> dict[str, Any]:
        """Names, and the combinations the interaction was learnt from."""
        return super().meta() | {"learnt": self._learnt}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore what `state` and `meta` returned."""
        super().load_state(state, meta)
        self._learnt = tuple(meta["learnt"])
        self._exponent = float(state["exponent"])
        self._prepare()
        self._interaction = Interaction(*(np.asarray(state[key]) for key in ("slope", "share", "weights")))
