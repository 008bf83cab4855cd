"""Condition means of training cells, denoised jointly: the background and effects that additive models add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import Method, TrainingData
from perturbed.models.baselines import average_conditions, effects_of
from perturbed.names import CONTROL, genes_of


def number_conditions(data: TrainingData, conditions: list[tuple[str, str]]) -> np.ndarray:
    """Row of each cell's (perturbation, context) among `conditions` (n_cells,)."""
    place = {key: i for i, key in enumerate(conditions)}
    return np.array([place[key] for key in zip(map(str, data.perturbation), map(str, data.context))], dtype=np.int64)


def summarise(
    data: TrainingData,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, str]], sparse.csr_matrix]:
    """Mean profile and number of cells of every condition, with the condition of each cell.

    Returns
    -------
    tuple
        Means (n_conditions, n_genes), cells (n_conditions,), row of each cell (n_cells,), the sorted (perturbation,
        context) of the rows, and the cells themselves.
    """
    means, conditions = average_conditions(data)
    row = number_conditions(data, conditions)
    return means, np.bincount(row, minlength=len(means)).astype(np.float64), row, conditions, data.X


class DenoisedEffects(Method):
    """Base of methods that hold a background profile per context and an effect per perturbation, both denoised."""

    def _set(self, profiles: np.ndarray, conditions: list[tuple[str, str]], genes: tuple[str, ...]) -> None:
        """Hold denoised profiles: the control's of each context, and effects averaged over contexts alike.

        Raises
        ------
        MethodError
            If a context has no control cells.
        """
        found = effects_of(profiles, conditions)
        self._hold(found.control, found.effect, found.contexts, found.perturbations, genes)

    def _hold(
        self,
        background: np.ndarray,
        effect: np.ndarray,
        contexts: tuple[str, ...],
        names: tuple[str, ...],
        genes: tuple[str, ...],
    ) -> None:
        self._background, self._effect, self._contexts, self._names, self._genes = (
            background, effect, contexts, names, genes,
        )  # fmt: skip
        self._row = {name: i for i, name in enumerate(names)}

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    def _members(self, perturbation: str) -> np.ndarray:
        """Rows of the single effects of a combination's genes.

        Raises
        ------
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        genes = genes_of(perturbation)
        missing = [gene for gene in genes if gene not in self._row]
        if missing:
            raise UnseenPerturbationError(
                f"{type(self).__name__} never saw {', '.join(missing)} perturbed alone in training"
            )
        return np.array([self._row[gene] for gene in genes], dtype=np.int64)

    def _combine(self, perturbation: str) -> np.ndarray:
        """Effect of a combination that was not in training (n_genes,)."""
        raise NotImplementedError

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Background of the context plus the effect.

        Raises
        ------
        MethodError
            If the context had no control cells in training.
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        if context not in self._contexts:
            known = ", ".join(self._contexts)
            raise MethodError(f"context {context!r} has no control cells in training; known: {known}")
        background = self._background[self._contexts.index(context)]
        if perturbation == CONTROL:
            return {"mean": background}
        row = self._row.get(perturbation)
        return {"mean": background + (self._combine(perturbation) if row is None else self._effect[row])}

    def state(self) -> dict[str, Any]:
        """Backgrounds and effects, float64."""
        return {"background": self._background, "effect": self._effect}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts and perturbations."""
        return {"genes": self._genes, "contexts": self._contexts, "perturbations": self._names}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore what `state` and `meta` returned."""
        names = tuple(meta["contexts"]), tuple(meta["perturbations"]), tuple(meta["genes"])
        self._hold(np.asarray(state["background"]), np.asarray(state["effect"]), *names)
