"""Baselines on mean profiles: every claim of a model is measured against them.

All predict `mean of the target context's control cells + effect`, where the effect of a perturbation is the mean over
the contexts it was seen in of `mean(perturbation, context) − mean(control, context)`. Training and validation cells
are used alike, and every perturbation weighs the same, however many cells it has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from perturbed.config import Section
from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, Method, TrainingData, require_seen
from perturbed.names import CONTROL, genes_of


@dataclass(frozen=True)
class Effects:
    """Mean profiles of the training cells.

    Parameters
    ----------
    control
        Mean of the control cells of each context, float64 (n_contexts, n_genes).
    effect
        Effect of each perturbation, float64 (n_perturbations, n_genes).
    contexts, perturbations
        Names of the rows, sorted; control is no perturbation.
    """

    control: np.ndarray
    effect: np.ndarray
    contexts: tuple[str, ...]
    perturbations: tuple[str, ...]


def average_conditions(data: TrainingData) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Mean expression of every (perturbation, context) among the cells.

    One product of a sparse indicator with the sparse cells, in float64; the cells are never made dense.

    Returns
    -------
    tuple
        Means (n_conditions, n_genes) and the sorted (perturbation, context) of the rows.
    """
    keys = list(zip(map(str, data.perturbation), map(str, data.context)))
    conditions = sorted(set(keys))
    place = {key: i for i, key in enumerate(conditions)}
    rows = np.array([place[key] for key in keys], dtype=np.int64)
    weight = 1.0 / np.bincount(rows, minlength=len(conditions))
    indicator = sparse.csr_matrix(
        (weight[rows], (rows, np.arange(len(rows)))), shape=(len(conditions), len(rows)), dtype=np.float64
    )
    return np.asarray((indicator @ data.X).toarray(), dtype=np.float64), conditions


def measure_effects(data: TrainingData) -> Effects:
    """Control means by context, and effects averaged over contexts with equal weight.

    Raises
    ------
    MethodError
        If a context has no control cells.
    """
    return effects_of(*average_conditions(data))


def effects_of(profiles: np.ndarray, conditions: Sequence[tuple[str, str]]) -> Effects:
    """Control profiles by context, and effects averaged over contexts with equal weight.

    Parameters
    ----------
    profiles
        One row a condition (n_conditions, n_genes).
    conditions
        `(perturbation, context)` of each row.

    Raises
    ------
    MethodError
        If a context has no control cells.
    """
    place = {key: i for i, key in enumerate(conditions)}
    contexts = tuple(sorted({context for _, context in conditions}))
    for context in contexts:
        if (CONTROL, context) not in place:
            raise MethodError(f"context {context!r} has no control cells in training; every method needs them")
    seen: dict[str, list[np.ndarray]] = {}
    for (perturbation, context), i in place.items():
        if perturbation != CONTROL:
            seen.setdefault(perturbation, []).append(profiles[i] - profiles[place[CONTROL, context]])
    names = tuple(sorted(seen))
    effect = np.stack([np.mean(seen[name], axis=0) for name in names]) if names else np.zeros((0, profiles.shape[1]))
    return Effects(np.stack([profiles[place[CONTROL, context]] for context in contexts]), effect, contexts, names)


def embed_genes(effects: Effects, n_components: int) -> np.ndarray:
    """Principal component scores of the genes in the training pseudobulks (n_genes, at most n_components).

    The pseudobulks are one column a condition, control first, each column centred over genes
    (Ahlmann-Eltze, Huber and Anders 2025).
    """
    n_genes = effects.effect.shape[1]
    pseudobulk = effects.control.mean(axis=0) + np.vstack([np.zeros(n_genes), effects.effect])
    u, s, _ = np.linalg.svd((pseudobulk - pseudobulk.mean(axis=1, keepdims=True)).T, full_matrices=False)
    k = min(n_components, len(s))
    return np.ascontiguousarray(u[:, :k] * s[:k])


def find_embeddable(effects: Effects, genes: Sequence[str], method: str) -> list[int]:
    """Rows of the perturbations all of whose genes are among the features.

    Raises
    ------
    MethodError
        If there is none.
    """
    known = set(genes)
    usable = [i for i, name in enumerate(effects.perturbations) if known.issuperset(genes_of(name))]
    if not usable:
        raise MethodError(
            f"{method} needs perturbed genes among the features and none is there; set `features.keep_perturbed`"
        )
    return usable


class NoParams(Section):
    """The method has no hyper-parameters."""


class MeanBaseline(Method):
    """Base of the baselines: holds the mean profiles and adds an effect to the control mean."""

    Params: ClassVar[type[Section]] = NoParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Average the cells of every condition."""
        self._set(measure_effects(data), tuple(data.genes))

    def _set(self, effects: Effects, genes: tuple[str, ...]) -> None:
        self._effects, self._genes = effects, genes
        self._row = {name: i for i, name in enumerate(effects.perturbations)}

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    @abstractmethod
    def predict_effect(self, perturbation: str) -> np.ndarray:
        """Effect of a perturbation other than control (n_genes,)."""

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Control mean of the context plus the predicted effect.

        Raises
        ------
        MethodError
            If the context had no control cells in training.
        UnseenPerturbationError
            If the method cannot predict the perturbation.
        """
        if context not in self._effects.contexts:
            known = ", ".join(self._effects.contexts)
            raise MethodError(f"context {context!r} has no control cells in training; known: {known}")
        control = self._effects.control[self._effects.contexts.index(context)]
        return {"mean": control if perturbation == CONTROL else control + self.predict_effect(perturbation)}

    def _seen_effect(self, perturbation: str) -> np.ndarray | None:
        row = self._row.get(perturbation)
        return None if row is None else self._effects.effect[row]

    def _mean_effect(self) -> np.ndarray:
        if not len(self._effects.effect):
            raise MethodError(f"{type(self).__name__} needs perturbed training cells; all cells are control")
        return np.asarray(self._effects.effect.mean(axis=0))

    def state(self) -> dict[str, Any]:
        """Control means and effects, float64."""
        return {"control": self._effects.control, "effect": self._effects.effect}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts and perturbations."""
        return {
            "genes": self._genes,
            "contexts": self._effects.contexts,
            "perturbations": self._effects.perturbations,
        }

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore the mean profiles."""
        names = tuple(meta["contexts"]), tuple(meta["perturbations"])
        self._set(Effects(np.asarray(state["control"]), np.asarray(state["effect"]), *names), tuple(meta["genes"]))


class NoChange(MeanBaseline):
    """Predicts the control mean: no perturbation does anything."""

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """Zero."""
        return np.zeros(len(self._genes))


class MeanEffect(MeanBaseline):
    """Predicts the same effect for all: the mean over training perturbations, each with equal weight."""

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`mean_p Δ_p`."""
        return self._mean_effect()


class Additive(MeanBaseline):
    """Predicts a combination by the sum of its genes' single effects.

    A perturbation that was in training as a whole is predicted by its own mean; only unseen combinations are sums.
    """

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`Δ_p` where p was seen, else `Σ_g Δ_g`.

        Raises
        ------
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        own = self._seen_effect(perturbation)
        if own is not None:
            return own
        singles = [name for name in self._effects.perturbations if len(genes_of(name)) == 1]
        genes = require_seen(perturbation, singles, "the additive baseline")
        return np.asarray(sum(self._effects.effect[self._row[gene]] for gene in genes))


class MatchingMean(MeanBaseline):
    """Predicts a combination by the mean of its genes' single profiles (Viñas Torné et al. 2025, Systema).

    `mean_g Δ_g` over the genes, where a gene never perturbed alone stands in with the mean over all training
    perturbations; a perturbation that was in training as a whole is predicted by its own mean.
    """

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`Δ_p` where p was seen, else the mean of the single effects."""
        own = self._seen_effect(perturbation)
        if own is not None:
            return own
        everything = self._mean_effect()
        singles = [self._seen_effect(gene) for gene in genes_of(perturbation)]
        return np.asarray(np.mean([everything if effect is None else effect for effect in singles], axis=0))


class PcaRidgeParams(Section):
    """Hyper-parameters of the bilinear linear model."""

    n_components: int = Field(10, ge=1)
    """Principal components of the gene embedding (published default 10). At most the number of conditions."""
    ridge: float = Field(0.1, gt=0)
    """Ridge penalty on both sides (published default 0.1)."""


class PcaRidge(MeanBaseline):
    """The linear model of Ahlmann-Eltze, Huber and Anders (2025), Nature Methods.

    `Δ ≈ G W Pᵀ + b`. G (n_genes, k) holds the principal component scores of the genes in the training pseudobulks (one
    column a condition, control included, columns centred); the row of P of a perturbation is the sum of the rows of G
    of its genes, zero for control; b is the mean effect over the conditions fitted. With penalty λ

    `W = (GᵀG + λI)⁻¹ Gᵀ (Δ − b) P (PᵀP + λI)⁻¹`.

    It needs no cell with a gene perturbed to predict that gene, but the gene must be among the features.
    """

    Params = PcaRidgeParams
    params: PcaRidgeParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Embed genes and solve the two-sided ridge regression.

        Raises
        ------
        MethodError
            If none of the perturbed genes is among the features.
        """
        super().fit(data, run)
        effects = self._effects
        usable = find_embeddable(effects, self._genes, "pca_ridge")
        self._embedding = embed_genes(effects, self.params.n_components)
        target = np.vstack([np.zeros(len(self._genes)), effects.effect[usable]])
        names = [CONTROL] + [effects.perturbations[i] for i in usable]
        perturbations = np.stack([self._embed(name) for name in names])
        self._offset = target.mean(axis=0)
        self._weight = np.ascontiguousarray(self._solve(target - self._offset, perturbations))

    def _solve(self, target: np.ndarray, perturbations: np.ndarray) -> np.ndarray:
        penalty = self.params.ridge * np.eye(self._embedding.shape[1])
        left = np.linalg.solve(self._embedding.T @ self._embedding + penalty, self._embedding.T @ target.T)
        return np.linalg.solve(perturbations.T @ perturbations + penalty, (left @ perturbations).T).T

    def _embed(self, perturbation: str) -> np.ndarray:
        rows = [self._genes.index(gene) for gene in genes_of(perturbation)]
        return np.asarray(self._embedding[rows].sum(axis=0))

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`G W p + b`.

        Raises
        ------
        UnseenPerturbationError
            If a gene is not among the features, and so has no embedding.
        """
        missing = [gene for gene in genes_of(perturbation) if gene not in self._genes]
        if missing:
            raise UnseenPerturbationError(f"pca_ridge has no expression of {', '.join(missing)} to embed it by")
        return np.asarray(self._embedding @ (self._weight @ self._embed(perturbation)) + self._offset)

    def state(self) -> dict[str, Any]:
        """Mean profiles and the regression."""
        return super().state() | {"embedding": self._embedding, "weight": self._weight, "offset": self._offset}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore mean profiles and the regression."""
        super().load_state(state, meta)
        self._embedding, self._weight, self._offset = (
            np.asarray(state[key]) for key in ("embedding", "weight", "offset")
        )
