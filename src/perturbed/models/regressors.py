"""Classical regressors from a perturbation's features to its effect: nearest neighbours, elastic net, random forest.

One training row is one condition: its features, and its effect on the mean profile (`baselines.measure_effects`),
control with effect zero included. The effects are regressed in the space of their own principal components and turned
back, so that 5,000 genes cost no more than a few dozen outputs. Fitted models are arrays, never pickles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from perturbed.config import Section
from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData, require_seen
from perturbed.models.baselines import MeanBaseline, embed_genes, find_embeddable
from perturbed.names import genes_of


class RegressorParams(Section):
    """What all regressors share."""

    features: Literal["multi_hot", "pca"] = "multi_hot"
    """`multi_hot`: which genes are perturbed; a gene never perturbed in training is refused. `pca`: the sum of the
    perturbed genes' principal component scores in the training pseudobulks; any gene among the features will do."""
    n_gene_components: int = Field(10, ge=1)
    """Components of the genes' embedding, with `features: pca`. At most the number of conditions."""
    n_components: int | None = Field(50, ge=1)
    """Principal components of the effects that are regressed; leave out to regress the genes themselves, at a cost
    that grows with their number."""


class Regressor(MeanBaseline):
    """Base of the regressors.

    With features F (n_conditions, n_features) and effects Y (n_conditions, n_genes), a subclass regresses the scores
    `(Y − ȳ) V` on F, where V (n_genes, n_components) holds the leading right singular vectors of `Y − ȳ`; the predicted
    effect is `ȳ + f(features) Vᵀ`.
    """

    Params: ClassVar[type[Section]] = RegressorParams
    params: RegressorParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Measure the effects and regress them on the features.

        Raises
        ------
        MethodError
            If all cells are control, or `features: pca` finds no perturbed gene among the features.
        """
        super().fit(data, run)
        effects = self._effects
        if not effects.perturbations:
            raise MethodError(f"{type(self).__name__} needs perturbed training cells; all cells are control")
        self._features_of = dict(self._describe_genes())
        known = [i for i, name in enumerate(effects.perturbations) if set(genes_of(name)) <= set(self._features_of)]
        described = [self._describe(effects.perturbations[i]) for i in known]
        features = np.vstack([np.zeros_like(described[0]), *described])
        target = np.vstack([np.zeros(len(self._genes)), effects.effect[known]])
        self._mean = target.mean(axis=0)
        self._components = self._find_components(target - self._mean)
        self._regress(features, self._project(target - self._mean), run)

    def _describe_genes(self) -> list[tuple[str, np.ndarray]]:
        effects = self._effects
        if self.params.features == "multi_hot":
            seen = sorted({gene for name in effects.perturbations for gene in genes_of(name)})
            return list(zip(seen, np.eye(len(seen))))
        find_embeddable(effects, self._genes, type(self).__name__)
        return list(zip(self._genes, embed_genes(effects, self.params.n_gene_components)))

    def _find_components(self, centred: np.ndarray) -> np.ndarray | None:
        """Leading right singular vectors (n_components, n_genes); None where the genes are regressed themselves."""
        if self.params.n_components is None:
            return None
        _, size, vectors = np.linalg.svd(centred, full_matrices=False)
        rank = int((size > max(size[0], 1e-300) * 1e-10).sum())
        return np.ascontiguousarray(vectors[: max(1, min(self.params.n_components, rank))])

    def _project(self, centred: np.ndarray) -> np.ndarray:
        return centred if self._components is None else centred @ self._components.T

    def _describe(self, perturbation: str) -> np.ndarray:
        return np.asarray(sum(self._features_of[gene] for gene in genes_of(perturbation)))

    @abstractmethod
    def _regress(self, features: np.ndarray, target: np.ndarray, run: FitRun) -> None:
        """Learn from features (n_conditions, n_features) and targets (n_conditions, n_outputs), control first."""

    @abstractmethod
    def _evaluate(self, features: np.ndarray) -> np.ndarray:
        """Predicted targets of features (n_features,)."""

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`ȳ + f(features) Vᵀ`.

        Raises
        ------
        UnseenPerturbationError
            If a gene has no features: never perturbed in training (`multi_hot`), not among the features (`pca`).
        """
        name = type(self).__name__
        if self.params.features == "multi_hot":
            require_seen(perturbation, tuple(self._features_of), name)
        missing = [gene for gene in genes_of(perturbation) if gene not in self._features_of]
        if missing:
            raise UnseenPerturbationError(f"{name} has no expression of {', '.join(missing)} to embed it by")
        found = self._evaluate(self._describe(perturbation))
        return np.asarray(self._mean + (found if self._components is None else found @ self._components))

    @abstractmethod
    def _learned(self) -> dict[str, np.ndarray]:
        """Arrays that `_restore` needs."""

    @abstractmethod
    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `_learned` returned."""

    def state(self) -> dict[str, Any]:
        """Mean profiles, features of the genes, components and the regression."""
        own = {"features": np.stack(list(self._features_of.values())), "mean": self._mean}
        if self._components is not None:
            own["components"] = self._components
        return super().state() | own | {f"model.{key}": value for key, value in self._learned().items()}

    def meta(self) -> dict[str, Any]:
        """Names, and the genes that have features."""
        return super().meta() | {"described": tuple(self._features_of)}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        super().load_state(state, meta)
        self._features_of = dict(zip(meta["described"], state["features"]))
        self._mean, self._components = state["mean"], state.get("components")
        self._restore({key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")})


class NearestNeighboursParams(RegressorParams):
    """Hyper-parameters of the nearest neighbours."""

    n_neighbors: int = Field(2, ge=1)
    """Training conditions to average. A combination's nearest ones are its genes' single perturbations; all those at
    the distance of the last one are taken too, so that no order decides."""
    weights: Literal["uniform", "distance"] = "distance"
    """`distance`: by the inverse of the distance, so that a perturbation seen in training is predicted by itself."""


class NearestNeighbours(Regressor):
    """Mean effect of the nearest training conditions in Euclidean distance between features.

    As scikit-learn's `KNeighborsRegressor`, except that conditions tied with the k-th neighbour count too: between
    multi-hot vectors nearly all distances are ties, which scikit-learn breaks by the order of rows.
    """

    Params = NearestNeighboursParams
    params: NearestNeighboursParams

    def _regress(self, features: np.ndarray, target: np.ndarray, run: FitRun) -> None:
        self._x, self._y = features, np.ascontiguousarray(target)

    def _evaluate(self, features: np.ndarray) -> np.ndarray:
        distance = np.sqrt(((self._x - features) ** 2).sum(axis=1))
        last = np.sort(distance)[min(self.params.n_neighbors, len(distance)) - 1]
        slack = 1e-9 * (1.0 + last)  # equal distances may differ in their last digits
        near = np.flatnonzero(distance <= last + slack)
        if self.params.weights == "uniform":
            return np.asarray(self._y[near].mean(axis=0))
        same = near[distance[near] <= slack]
        if len(same):
            return np.asarray(self._y[same].mean(axis=0))
        return np.asarray(np.average(self._y[near], axis=0, weights=1.0 / distance[near]))

    def _learned(self) -> dict[str, np.ndarray]:
        return {"x": self._x, "y": self._y}

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._x, self._y = state["x"], state["y"]


class ElasticNetParams(RegressorParams):
    """Hyper-parameters of the elastic net."""

    alpha: float = Field(1e-3, gt=0)
    """Weight of the penalty, beside a squared error averaged over conditions and halved. scikit-learn's own default of
    1 takes every coefficient to zero on multi-hot features, which leaves one effect for all."""
    l1_ratio: float = Field(0.5, ge=0, le=1)
    """Share of the L1 norm in the penalty; the rest is half the squared L2 norm."""
    max_iter: int = Field(10_000, ge=1)
    """Most sweeps over the coefficients."""


class LinearElasticNet(Regressor):
    """Linear regression with L1 and L2 penalty (Zou and Hastie 2005), fitted by scikit-learn's coordinate descent.

    For each output `min ‖y − Fw − c‖² / (2n) + α l ‖w‖₁ + α (1 − l) ‖w‖² / 2`.
    """

    Params = ElasticNetParams
    params: ElasticNetParams

    def _regress(self, features: np.ndarray, target: np.ndarray, run: FitRun) -> None:
        from sklearn.linear_model import ElasticNet

        p = self.params
        model = ElasticNet(alpha=p.alpha, l1_ratio=p.l1_ratio, max_iter=p.max_iter, tol=1e-6)
        model.fit(features, target)
        n_outputs = target.shape[1]
        self._coefficients = np.ascontiguousarray(np.reshape(model.coef_, (n_outputs, -1)))
        self._intercept = np.broadcast_to(model.intercept_, (n_outputs,)).astype(np.float64)

    def _evaluate(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(self._coefficients @ features + self._intercept)

    def _learned(self) -> dict[str, np.ndarray]:
        return {"coefficients": self._coefficients, "intercept": self._intercept}

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._coefficients, self._intercept = state["coefficients"], state["intercept"]


class ForestParams(RegressorParams):
    """Hyper-parameters of the random forest."""

    n_trees: int = Field(100, ge=1)
    """Trees averaged; more only steady the result."""
    max_depth: int | None = Field(None, ge=1)
    """Deepest split; leave out to grow trees until leaves are pure."""
    min_samples_leaf: int = Field(1, ge=1)
    """Fewest conditions in a leaf; raise it to smooth."""
    max_features: float = Field(1.0, gt=0, le=1)
    """Share of the features tried at each split."""


class RandomForest(Regressor):
    """Random forest (Breiman 2001), grown by scikit-learn on all outputs together.

    Its trees are kept as arrays, one after the other, with children counted from the first node of the first tree.
    """

    Params = ForestParams
    params: ForestParams
    stochastic = True

    def _regress(self, features: np.ndarray, target: np.ndarray, run: FitRun) -> None:
        from sklearn.ensemble import RandomForestRegressor

        p = self.params
        forest = RandomForestRegressor(
            n_estimators=p.n_trees,
            max_depth=p.max_depth,
            min_samples_leaf=p.min_samples_leaf,
            max_features=p.max_features,
            n_jobs=run.threads,
            random_state=run.seed,
        )
        forest.fit(features.astype(np.float32), target if target.shape[1] > 1 else target.ravel())
        trees = [tree.tree_ for tree in forest.estimators_]
        starts = np.cumsum([0] + [tree.node_count for tree in trees])
        self._root = starts[:-1].astype(np.int64)
        self._left, self._right = (
            np.concatenate([np.where(child < 0, -1, child + start) for child, start in zip(children, starts)])
            for children in ([t.children_left for t in trees], [t.children_right for t in trees])
        )
        self._feature = np.concatenate([tree.feature for tree in trees])
        self._threshold = np.concatenate([tree.threshold for tree in trees])
        values = np.concatenate([tree.value[:, :, 0] for tree in trees])
        leaf = self._left < 0  # inner nodes predict nothing
        self._leaf = np.where(leaf, np.cumsum(leaf) - 1, -1)
        self._value = np.ascontiguousarray(values[leaf])

    def _evaluate(self, features: np.ndarray) -> np.ndarray:
        x = features.astype(np.float32)  # as scikit-learn compares
        node = self._root
        while True:
            inner = self._left[node] >= 0
            if not inner.any():
                return np.asarray(self._value[self._leaf[node]].mean(axis=0))
            goes_left = x[self._feature[node]] <= self._threshold[node]
            node = np.where(inner, np.where(goes_left, self._left[node], self._right[node]), node)

    def _learned(self) -> dict[str, np.ndarray]:
        names = ("root", "left", "right", "feature", "threshold", "leaf", "value")
        return {name: getattr(self, f"_{name}") for name in names}

    def _restore(self, state: Mapping[str, np.ndarray]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)
