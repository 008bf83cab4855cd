"""The additive baseline in a latent space: encode cells, add the single perturbations' mean shifts, decode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from perturbed.config import Section
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, Method, TrainingData, require_seen
from perturbed.names import CONTROL, genes_of


class LatentAdditiveParams(Section):
    """What all latent additive methods share."""

    n_control: int = Field(1000, ge=1)
    """Control cells of each context that are shifted and decoded, drawn at random where there are more."""
    n_samples: int = Field(200, ge=0)
    """Cells generated per prediction (`cells.h5ad` and the variance); 0 gives means only and saves disk."""


class LatentAdditive(Method):
    """Base of the latent additive methods.

    With latents z of all training and validation cells, the shift of a perturbation is `δ_p = mean_c [z̄(p, c) −
    z̄(control, c)]` over the contexts it was seen in. A perturbation is predicted by decoding `z + shift` of the target
    context's control cells, where the shift is δ_p if p was in training as a whole, else the sum of its genes' δ.
    """

    Params: ClassVar[type[Section]] = LatentAdditiveParams
    params: LatentAdditiveParams

    @abstractmethod
    def _decode(self, latents: np.ndarray, rows: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Log-normalised expression (n_cells, n_genes) of shifted control cells.

        Parameters
        ----------
        latents
            Shifted latents (n_cells, n_latent).
        rows
            Which of the kept control cells they come from (n_cells,).
        rng
            Draws observations where given; else expectations are returned.
        """

    def _learn_shifts(self, data: TrainingData, latents: np.ndarray, seed: int) -> np.ndarray:
        """Shifts and control cells from the latents of all cells; returns the rows of the control cells kept."""
        self._genes = tuple(data.genes)
        self._contexts = tuple(sorted(set(map(str, data.context))))
        seen: dict[str, list[np.ndarray]] = {}
        chosen: list[np.ndarray] = []
        rng = np.random.default_rng([seed, 21])
        for context in self._contexts:
            here = np.asarray(data.context == context)
            control = np.flatnonzero(here & (data.perturbation == CONTROL))
            if not len(control):
                raise MethodError(f"context {context!r} has no control cells in training; every method needs them")
            centre = latents[control].mean(axis=0, dtype=np.float64)
            for name in sorted(set(map(str, data.perturbation[here])) - {CONTROL}):
                own = latents[here & (data.perturbation == name)].mean(axis=0, dtype=np.float64)
                seen.setdefault(name, []).append(own - centre)
            chosen.append(rng.permutation(control)[: self.params.n_control])
        self._perturbations = tuple(sorted(seen))
        shifts = [np.mean(seen[name], axis=0) for name in self._perturbations]
        self._shift = np.stack(shifts) if shifts else np.zeros((0, latents.shape[1]))
        rows = np.concatenate(chosen)
        self._control = np.ascontiguousarray(latents[rows], dtype=np.float64)
        self._control_context = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
        return rows

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    def find_shift(self, perturbation: str) -> np.ndarray:
        """The latent shift of a perturbation (n_latent,).

        Raises
        ------
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        place = {name: i for i, name in enumerate(self._perturbations)}
        if perturbation == CONTROL:
            return np.zeros(self._control.shape[1])
        if perturbation in place:
            return np.asarray(self._shift[place[perturbation]])
        singles = [name for name in self._perturbations if len(genes_of(name)) == 1]
        genes = require_seen(perturbation, singles, type(self).__name__)
        return np.asarray(self._shift[[place[gene] for gene in genes]].sum(axis=0))

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Mean over the context's control cells, and generated cells with their variance.

        Raises
        ------
        MethodError
            If the context had no control cells in training.
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        if context not in self._contexts:
            raise MethodError(f"context {context!r} was not in training; known: {', '.join(self._contexts)}")
        shift = self.find_shift(perturbation)
        rows = np.flatnonzero(self._control_context == self._contexts.index(context))
        result = {"mean": self._decode(self._control[rows] + shift, rows, None).mean(axis=0)}
        if self.params.n_samples:
            rng = np.random.default_rng([seed, 22])
            drawn = rows[rng.integers(len(rows), size=self.params.n_samples)]
            cells = self._decode(self._control[drawn] + shift, drawn, rng)
            result |= {"cells": cells.astype(np.float32), "variance": cells.var(axis=0)}
        return result

    def state(self) -> dict[str, Any]:
        """Shifts and control latents."""
        return {"shift": self._shift, "control": self._control, "control_context": self._control_context}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts and perturbations."""
        return {"genes": self._genes, "contexts": self._contexts, "perturbations": self._perturbations}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore shifts and control latents."""
        self._genes, self._contexts = tuple(meta["genes"]), tuple(meta["contexts"])
        self._perturbations = tuple(meta["perturbations"])
        self._shift, self._control = np.asarray(state["shift"]), np.asarray(state["control"])
        self._control_context = np.asarray(state["control_context"])


class PcaAdditiveParams(LatentAdditiveParams):
    """Hyper-parameters of the additive baseline on principal components."""

    n_pcs: int = Field(50, ge=1)
    """Principal components of the training cells. Fewer denoise more and lose more; at most the rank."""


class PcaAdditive(LatentAdditive):
    """Additive on principal components of the training cells, decoded by the transposed loadings.

    `x̂ = m + L (z + Σ_g δ_g)` with `z = Lᵀ(x − m)`, where m and L (n_genes, n_pcs) are mean and loadings of cells whose
    part is `train`. The mean prediction is that of all control cells: decoding is linear. Generated cells are decoded
    control cells, without the variation outside of the components.
    """

    Params = PcaAdditiveParams
    params: PcaAdditiveParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Fit the components, then average the scores of every condition."""
        from perturbed.data.features import fit_pca
        from perturbed.data.matrices import column_moments

        train = data.X[np.flatnonzero(~data.is_val)] if data.is_val.any() else data.X
        self._centre, _ = column_moments(train)
        self._loadings = np.ascontiguousarray(fit_pca(train, self._centre, self.params.n_pcs, seed=0))
        latents = self.represent(data.X)
        self._learn_shifts(data, latents, seed=0)
        control = np.asarray(data.perturbation == CONTROL)
        self._mean = np.stack([latents[control & (data.context == c)].mean(axis=0) for c in self._contexts])

    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Principal component scores (n_cells, n_pcs)."""
        return np.asarray(X @ self._loadings - self._centre @ self._loadings)

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """As its base, the mean over all control cells."""
        result = super().predict_one(perturbation, context, seed=seed)
        centre = self._mean[self._contexts.index(context)]
        return result | {"mean": self._centre + self._loadings @ (centre + self.find_shift(perturbation))}

    def _decode(self, latents: np.ndarray, rows: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return np.asarray(self._centre + latents @ self._loadings.T)

    def state(self) -> dict[str, Any]:
        """Shifts, control scores and the components."""
        return super().state() | {"centre": self._centre, "loadings": self._loadings, "mean": self._mean}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        super().load_state(state, meta)
        self._centre, self._loadings, self._mean = (state[key] for key in ("centre", "loadings", "mean"))
