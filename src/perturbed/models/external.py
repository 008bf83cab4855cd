"""Predictions made elsewhere, behind the same door as every method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from perturbed.config import Section
from perturbed.data.contracts import Prediction, read_prediction
from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, Method, TrainingData
from perturbed.names import genes_of, join_genes

ANY_CONTEXT = "all"
"""The context of rows of a file that names none; such rows answer for every context."""


class ExternalParams(Section):
    """Where the predictions lie."""

    path: str
    """An h5ad file: one row per predicted perturbation (`obs["perturbation"]`, such as `A+B`), genes by
    name in `var_names`, predicted mean log-normalised expression in `X`; optionally `obs["context"]` and
    `layers["variance"]`."""


class External(Method):
    """Predictions from a user's own file.

    Genes are matched by name: their order does not matter, further genes are ignored, missing ones are an error. The
    rows are copied into the fitted model, so that it stays what it was when the file changes.
    """

    Params = ExternalParams
    params: ExternalParams

    def __init__(self, params: Section | None = None) -> None:
        if params is None:
            raise MethodError("external needs `path`, the h5ad file with the predictions; set it under `params`")
        super().__init__(params)

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Read the file and check its genes against the split's.

        Raises
        ------
        MethodError
            If the file lacks a gene; the first one is named.
        """
        prediction = read_prediction(self.params.path)
        column = {gene: i for i, gene in enumerate(prediction.genes)}
        missing = [gene for gene in data.genes if gene not in column]
        if missing:
            raise MethodError(
                f"{self.params.path}: gene {missing[0]!r} is missing (and {len(missing) - 1} more of "
                f"{len(data.genes)}); predict every gene of the split's features.csv"
            )
        order = [column[gene] for gene in data.genes]
        variance = prediction.variance
        self._keep(prediction, prediction.mean[:, order], None if variance is None else variance[:, order])
        self._genes = tuple(data.genes)

    def _keep(self, prediction: Prediction, mean: np.ndarray, variance: np.ndarray | None) -> None:
        canonical = [join_genes(genes_of(name)) for name in prediction.perturbation]
        self._names = tuple(zip(canonical, prediction.context))
        twice = [name for name, n in Counter(self._names).items() if n > 1]
        if twice:
            raise MethodError(f"{self.params.path}: {' in '.join(twice[0])} is predicted twice; give one row each")
        self._mean = np.ascontiguousarray(mean, dtype=np.float64)
        self._variance = None if variance is None else np.ascontiguousarray(variance, dtype=np.float64)

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions, in the split's order."""
        return self._genes

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """The row of the file.

        Raises
        ------
        UnseenPerturbationError
            If the file has no such row.
        """
        place = {name: i for i, name in enumerate(self._names)}
        row = place.get((perturbation, context), place.get((perturbation, ANY_CONTEXT)))
        if row is None:
            raise UnseenPerturbationError(f"{self.params.path} holds no prediction of {perturbation} in {context}")
        result = {"mean": self._mean[row]}
        return result if self._variance is None else result | {"variance": self._variance[row]}

    def state(self) -> dict[str, Any]:
        """The file's rows, genes in the split's order."""
        state = {"mean": self._mean}
        return state if self._variance is None else state | {"variance": self._variance}

    def meta(self) -> dict[str, Any]:
        """Names of genes and rows."""
        return {"genes": self._genes, "rows": [list(name) for name in self._names]}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore the rows."""
        self._genes = tuple(meta["genes"])
        self._names = tuple((str(perturbation), str(context)) for perturbation, context in meta["rows"])
        self._mean = state["mean"]
        self._variance = state.get("variance")
