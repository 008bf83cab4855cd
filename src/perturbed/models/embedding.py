"""Heads on the embeddings of foundation models (UCE, scFoundation, Geneformer, STATE), read from files by name.

The embedding is made elsewhere and stays frozen; what is fitted here is small and linear. `docs/methods.md` says how
to make the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

from perturbed.config import Section
from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData, require_seen
from perturbed.models.baselines import MeanBaseline, measure_effects
from perturbed.names import genes_of

RIDGE_GRID = np.logspace(-3, 3, 13)
"""Penalties among which leave-one-out chooses."""


def read_vectors(path: str | Path, key: str | None = None) -> tuple[pd.Index, np.ndarray]:
    """Named vectors from a file: their names, and the vectors in rows (n_names, n_dimensions), float64.

    Parameters
    ----------
    path
        CSV with the name in the first column and a header, or h5ad with the names in `obs_names`.
    key
        h5ad only: the entry of `obsm`. None takes the only entry of `obsm`, or `X` where there is none.

    Raises
    ------
    DataError
        If the file cannot be read, `key` is missing or ambiguous, or a name is there twice or a value is no finite
        number.
    """
    path = Path(path)
    try:
        names, values = _read_h5ad(path, key) if path.suffix == ".h5ad" else _read_csv(path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{path}: not a readable table of vectors ({reason}); see docs/methods.md, Embeddings"
        ) from None
    if names.has_duplicates:
        twice = names[names.duplicated()]
        raise DataError(f"{path}: {len(twice)} names are there more than once, such as {twice[0]!r}; keep one of each")
    if values.ndim != 2 or not np.isfinite(values).all():
        raise DataError(f"{path}: vectors must be one row of finite numbers for each name; remake the file")
    return names, values


def _read_csv(path: Path) -> tuple[pd.Index, np.ndarray]:
    table = pd.read_csv(path, index_col=0)
    return table.index.astype(str), table.to_numpy(dtype=np.float64)


def _read_h5ad(path: Path, key: str | None) -> tuple[pd.Index, np.ndarray]:
    import h5py
    from anndata.io import read_elem

    with h5py.File(path) as file:
        there = sorted(file["obsm"]) if "obsm" in file else []
        if key is not None and key not in there:
            raise DataError(f"{path}: obsm has no {key!r}; set `key` to one of: {', '.join(there) or 'none there'}")
        if key is None and len(there) > 1:
            raise DataError(f"{path}: obsm holds several embeddings; set `key` to one of: {', '.join(there)}")
        chosen = key or (there[0] if there else None)
        values: Any = read_elem(file["X"] if chosen is None else file["obsm"][chosen])
        names = read_elem(file["obs"]).index.astype(str)
    dense = values.toarray() if sparse.issparse(values) else values  # type: ignore[attr-defined]
    return names, np.asarray(dense, dtype=np.float64)


def take_vectors(path: str | Path, wanted: Sequence[str], kind: str, key: str | None = None) -> np.ndarray:
    """The vectors of `wanted`, in that order, from a file that may hold more (n_wanted, n_dimensions).

    Raises
    ------
    MethodError
        If some are missing; says how many.
    """
    names, values = read_vectors(path, key)
    rows = names.get_indexer(pd.Index(wanted))
    _refuse_missing(path, wanted, rows, kind)
    return np.asarray(values[rows])


def _refuse_missing(path: str | Path, wanted: Sequence[str], rows: np.ndarray, kind: str) -> None:
    missing = [name for name, row in zip(wanted, rows) if row < 0]
    if missing:
        raise MethodError(
            f"{path}: no vector for {len(missing)} of {len(wanted)} {kind}, such as {missing[0]!r}; make the file with "
            "the names of the prepared data"
        )


class GeneEmbeddingParams(Section):
    """Hyper-parameters of the head on gene embeddings."""

    head: Literal["ridge", "knn"] = "ridge"
    """`ridge`: effects linear in the embedding of the perturbed genes. `knn`: the mean effect of the nearest training
    perturbations, which never leaves what was seen."""
    ridge: float | None = Field(None, gt=0)
    """Penalty of the ridge head, where the perturbed genes' embeddings have mean squared length 1. Leave out to choose
    it by leave-one-perturbation-out on the training effects."""
    n_neighbours: int = Field(5, ge=1)
    """Perturbations averaged by the knn head; at most those in training."""
    n_components: int = Field(128, ge=1)
    """Principal components kept of the embedding, taken over all genes of the file."""
    key: str | None = None
    """Entry of `obsm` where the file is an h5ad with several."""


class GeneEmbedding(MeanBaseline):
    """Effects from the embeddings of the perturbed genes; predicts every gene that the file holds.

    With p_g the embedding of a gene, centred over the training's perturbed genes, and n the number of genes in the
    perturbation, the ridge head is `Δ = Σ_g (b + W p_g) = n b + W Σ_g p_g`, b unpenalised: additive over genes, as
    the linear baseline of Ahlmann-Eltze et al. is, but for b, which counts once for each gene.
    """

    Params = GeneEmbeddingParams
    params: GeneEmbeddingParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Read and reduce the embedding, and fit the head to the mean effects.

        Raises
        ------
        MethodError
            If the card names no file, or the file lacks perturbed genes of the training cells.
        """
        super().fit(data, run)
        self._mean_effect()  # refuses training cells without any perturbation
        names, vectors = read_vectors(self.require_file(data, "gene_embedding"), self.params.key)
        seen = data.seen_genes
        rows = names.get_indexer(pd.Index(seen))
        _refuse_missing(self.require_file(data, "gene_embedding"), seen, rows, "perturbed genes")
        scores = _principal_scores(vectors, self.params.n_components)
        scores -= scores[rows].mean(axis=0)
        length = np.sqrt(np.square(scores[rows]).sum(axis=1).mean())
        self._vectors = (scores / (length or 1.0)).astype(np.float32)
        self._named = tuple(names)
        self._place = {name: i for i, name in enumerate(self._named)}
        self._fit_head()

    def _fit_head(self) -> None:
        perturbations = self._effects.perturbations
        embedded = np.stack([self._embed(name) for name in perturbations])
        if self.params.head == "knn":
            self._head = {"embedded": embedded}
            return
        size = np.array([len(genes_of(name)) for name in perturbations], dtype=np.float64)
        target = self._effects.effect
        # partial out the unpenalised n b
        project = np.eye(len(size)) - np.outer(size, size) / (size @ size)
        weight = _fit_ridge(project @ embedded, project @ target, self.params.ridge)
        offset = size @ (target - embedded @ weight) / (size @ size)
        self._head = {"weight": weight, "offset": offset}

    def _embed(self, perturbation: str) -> np.ndarray:
        genes = genes_of(perturbation)
        missing = [gene for gene in genes if gene not in self._place]
        if missing:
            raise UnseenPerturbationError(f"the gene embedding has no vector for {', '.join(missing)}")
        return np.asarray(self._vectors[[self._place[gene] for gene in genes]].sum(axis=0), dtype=np.float64)

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`n b + W Σ_g p_g`, or the mean effect of the nearest training perturbations.

        Raises
        ------
        UnseenPerturbationError
            If the file holds no vector for a gene.
        """
        embedded = self._embed(perturbation)
        if self.params.head == "ridge":
            n = len(genes_of(perturbation))
            return np.asarray(n * self._head["offset"] + embedded @ self._head["weight"])
        distance = np.square(self._head["embedded"] - embedded).sum(axis=1)
        nearest = np.argsort(distance, kind="stable")[: self.params.n_neighbours]
        return np.asarray(self._effects.effect[nearest].mean(axis=0))

    def state(self) -> dict[str, Any]:
        """Mean profiles, reduced embedding and head."""
        return super().state() | {"vectors": self._vectors} | {f"head.{k}": v for k, v in self._head.items()}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts, perturbations and of the embedding's genes."""
        return super().meta() | {"named": self._named}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted head."""
        super().load_state(state, meta)
        self._named = tuple(meta["named"])
        self._place = {name: i for i, name in enumerate(self._named)}
        self._vectors = np.asarray(state["vectors"])
        self._head = {k.removeprefix("head."): np.asarray(v) for k, v in state.items() if k.startswith("head.")}


class CellEmbeddingParams(Section):
    """Hyper-parameters of the head on cell embeddings."""

    n_components: int = Field(50, ge=1)
    """Principal components kept of the training cells' embeddings. More of them follow the single effects more
    closely, noise included."""
    ridge: float = Field(0.01, ge=0)
    """Penalty of the decoder from components to expression, for components of variance 1 and per cell: 0.01 shrinks
    by 1 %. Raise it for few cells."""
    key: str | None = None
    """Entry of `obsm` where the file is an h5ad with several."""


class CellEmbedding(MeanBaseline):
    """Mean shifts in the embedding space of cells, decoded by ridge regression.

    With z the whitened principal components of the training cells' embeddings, `x ≈ x̄ + W z` is fitted on the cells,
    the shift `s_p` of a perturbation is the mean over contexts of `mean z(p) − mean z(control)`, and
    `Δ_p = W s_p`, where an unseen combination is shifted by the sum of its genes' shifts. The decoder being linear,
    this is the additive baseline as far as the embedding retains it.
    """

    Params = CellEmbeddingParams
    params: CellEmbeddingParams

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Read the training cells' vectors, fit the decoder and average the shifts.

        Raises
        ------
        MethodError
            If the card names no file, or the file lacks training cells.
        """
        super().fit(data, run)
        self._mean_effect()  # refuses training cells without any perturbation
        path = self.require_file(data, "cell_embedding")
        self._source = str(path)
        vectors = take_vectors(path, [str(cell) for cell in data.cells], "training cells", self.params.key)
        if len(vectors) != len(data.perturbation):
            raise MethodError(f"{path}: training cells without names have no vectors; rerun `perturbed prepare`")
        z = _whiten(_principal_scores(vectors, self.params.n_components))
        centred = np.asarray((data.X.T @ z).T, dtype=np.float64) - np.outer(z.sum(axis=0), data.X.mean(axis=0))
        gram = z.T @ z + self.params.ridge * len(z) * np.eye(z.shape[1])
        self._weight = np.ascontiguousarray(np.linalg.solve(gram, centred))
        self._shift = measure_effects(replace(data, X=sparse.csr_matrix(z))).effect

    def predict_effect(self, perturbation: str) -> np.ndarray:
        """`W s_p` where p was seen, else `W Σ_g s_g`.

        Raises
        ------
        UnseenPerturbationError
            If a gene was never perturbed alone.
        """
        if perturbation in self._row:
            return np.asarray(self._shift[self._row[perturbation]] @ self._weight)
        singles = [name for name in self._effects.perturbations if len(genes_of(name)) == 1]
        genes = require_seen(perturbation, singles, "the head on cell embeddings")
        return np.asarray(sum(self._shift[self._row[gene]] for gene in genes) @ self._weight)

    def represent_cells(self, X: sparse.csr_matrix, cells: Sequence[str]) -> np.ndarray:
        """The vectors of cells as the file has them, which it was fitted with (n_cells, n_dimensions).

        Parameters
        ----------
        X
            Not used: the vectors were made elsewhere.
        cells
            Names of the cells (n_cells,).

        Raises
        ------
        DataError
            If the file is gone or no longer readable.
        MethodError
            If it lacks some of the cells.
        """
        return take_vectors(self._source, cells, "cells", self.params.key)

    def state(self) -> dict[str, Any]:
        """Mean profiles, decoder and shifts."""
        return super().state() | {"weight": self._weight, "shift": self._shift}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts and perturbations, and where the vectors are."""
        return super().meta() | {"source": self._source}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted head."""
        super().load_state(state, meta)
        self._weight, self._shift = np.asarray(state["weight"]), np.asarray(state["shift"])
        self._source = str(meta["source"])


def _principal_scores(vectors: np.ndarray, n_components: int) -> np.ndarray:
    """Scores of the leading principal components, constant directions left out (n_vectors, at most n_components)."""
    from sklearn.decomposition import PCA

    k = min(n_components, *vectors.shape)
    pca = PCA(n_components=k, random_state=0)
    scores = pca.fit_transform(vectors)
    kept = pca.singular_values_ > 1e-10 * max(pca.singular_values_.max(initial=0.0), np.finfo(np.float64).tiny)
    return np.asarray(scores[:, kept])


def _whiten(scores: np.ndarray) -> np.ndarray:
    """Components of mean 0 and variance 1."""
    return np.asarray((scores - scores.mean(axis=0)) / scores.std(axis=0))


def _fit_ridge(features: np.ndarray, target: np.ndarray, penalty: float | None) -> np.ndarray:
    """Weights of a ridge regression without intercept (n_features, n_targets); None chooses by leave-one-out."""
    from sklearn.linear_model import Ridge, RidgeCV

    model = Ridge(penalty, fit_intercept=False) if penalty else RidgeCV(RIDGE_GRID, fit_intercept=False)
    return np.ascontiguousarray(model.fit(features, target).coef_.T)
