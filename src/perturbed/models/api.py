"""PerturbedVAE outside the pipeline: fit on an AnnData, look at latents, predict, save and load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import Section, parse
from perturbed.data.cards import Keys
from perturbed.data.labels import canonical_labels
from perturbed.errors import DataError, MethodError
from perturbed.models.base import FitRun, MethodSpec, TrainingData, load_model, save_model
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams

if TYPE_CHECKING:
    from anndata import AnnData

SPEC = MethodSpec(
    title="PerturbedVAE",
    implementation="perturbed.models.perturbedvae:PerturbedVAE",
    stochastic=True,
    resources="gpu",
    reference="Jiang et al. 2026, arXiv:2605.19343",
)
ALL = "all"
"""The context of cells that are not told apart."""
N_COMPONENTS = 50
"""Principal components that matched control partners are looked for among."""


class AnnDataKeys(Section):
    """Where an AnnData keeps what the model needs; written beside the weights. The defaults are the pipeline's."""

    perturbation_key: str = "perturbation"
    """Column of `obs` with the label, such as `A+B`."""
    control: str = "control"
    """Label of control cells."""
    layer: str | None = None
    """Layer of log-normalised expression; None is `X`."""
    counts_layer: str | None = "counts"
    """Layer of counts, for a count likelihood; None where there is none."""
    context_key: str | None = None
    """Column of `obs` with the context, such as the cell type; None where all cells are of one."""


class PerturbedVAEModel:
    """PerturbedVAE on an AnnData, `perturbed.PerturbedVAE` for short.

    >>> model = perturbed.PerturbedVAE(adata, epochs=50).fit(seed=0)  # doctest: +SKIP
    >>> model.predict(["A+B", "A+B+C"])  # doctest: +SKIP

    The fitted method is `model.method`; a saved folder is the same as one of `perturbed fit`.

    Parameters
    ----------
    adata
        Cells with log-normalised expression and a label each. All genes are used: choose them beforehand.
    perturbation_key, control
        Column of `obs` with the label (genes joined by `+`, in any order), and the label of control cells.
    layer
        Layer of log-normalised expression; None is `X`.
    counts_layer
        Layer of counts; needed for `likelihood="nb"` only.
    context_key
        Column of `obs` with the context (cell type, cell line), if there are several. Every one needs control cells.
    **params
        Hyper-parameters, `perturbed.models.perturbedvae.PerturbedVAEParams`; their defaults are the paper's, for
        100,000 cells. On some thousand cells take `lr=1e-3`.

    Raises
    ------
    ConfigError
        If a hyper-parameter is unknown or out of range.
    DataError
        If a column or layer is missing, or the expression is not log-normalised.
    MethodError
        If the data do not suit the hyper-parameters (no control cells, no counts).
    """

    def __init__(
        self,
        adata: AnnData,
        perturbation_key: str = "perturbation",
        control: str = "control",
        layer: str | None = None,
        counts_layer: str | None = None,
        context_key: str | None = None,
        **params: Any,
    ) -> None:
        self.keys = AnnDataKeys(
            perturbation_key=perturbation_key,
            control=control,
            layer=layer,
            counts_layer=counts_layer,
            context_key=context_key,
        )
        self.method = PerturbedVAE(parse(PerturbedVAEParams, params, "PerturbedVAE"))
        self.adata: AnnData | None = adata
        self.history = pd.DataFrame()
        data = self._read(adata)
        self.method.check(data)
        self._data: TrainingData | None = data
        self._seed: int | None = None

    def __repr__(self) -> str:
        state = "not fitted" if self._seed is None else f"fitted on {len(self.method.perturbed)} perturbed genes"
        return f"PerturbedVAE ({state})"

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(
        self, *, seed: int = 0, device: str = "auto", validation_size: float = 0.0, progress: bool = True
    ) -> PerturbedVAEModel:
        """Train; the terms of the loss of every epoch are in `history` afterwards.

        Parameters
        ----------
        seed
            Of weights, order, draws and validation cells.
        device
            `auto` (a GPU where there is one), `cpu` or `cuda`.
        validation_size
            Share of the cells set aside to watch the loss; `patience` stops on it.
        progress
            Show a bar on a terminal.

        Returns
        -------
        PerturbedVAEModel
            Itself.

        Raises
        ------
        MethodError
            If training diverges, there is no GPU where one was asked for, or the model was loaded without cells.
        """
        if self._data is None:
            raise MethodError("fit: this model was loaded, and holds no cells to train on; build a new one from them")
        if not 0 <= validation_size < 1:
            raise MethodError(f"validation_size: must be a share in [0, 1), got {validation_size}")
        is_val = np.random.default_rng([seed, 6]).random(self._data.X.shape[0]) < validation_size
        data = replace(self._data, is_val=is_val)
        if self.method.params.partners == "matched_pca":
            data = _with_components(data, seed)
        rows: list[dict[str, float]] = []
        run = FitRun(seed, _resolve(device), history=lambda row: rows.append(dict(row)), progress=progress)
        self.method.fit(data, run)
        self.history = pd.DataFrame(rows).set_index("epoch")
        self._seed = seed
        return self

    # --- looking ----------------------------------------------------------------------------------------------------

    def get_latent_representation(
        self, adata: AnnData | None = None, kind: Literal["iota", "nu", "encoder"] = "iota"
    ) -> np.ndarray:
        """Latents of cells, float32 (n_cells, n_latents).

        Parameters
        ----------
        adata
            Cells; None takes those of training. Genes are found by name.
        kind
            `iota`: posterior mean of the background z_ι. `nu`: that of the response z_ν, for which the cells' labels
            are read. `encoder`: output of the shared encoder. Only `nu` sees the label.

        Raises
        ------
        DataError
            If genes, a column or a layer are missing.
        UnseenPerturbationError
            If `nu` is asked for and a label holds a gene that was perturbed in no training cell.
        """
        self._require_fit()
        if kind not in ("iota", "nu", "encoder"):
            raise MethodError(f"kind: must be iota, nu or encoder, got {kind!r}")
        if adata is None and self.adata is None:
            raise MethodError("get_latent_representation: this model was loaded without cells; pass an AnnData")
        cells = self.adata if adata is None else adata
        X = self._expression(cells, self.method.genes)
        if kind == "iota":
            return self.method.encode_background(X)
        return self.method.represent(X) if kind == "encoder" else self.method.encode_response(X, self._labels(cells))

    # --- predicting -------------------------------------------------------------------------------------------------

    def predict(
        self,
        perturbations: Sequence[str],
        control_cells: AnnData | None = None,
        n_cells: int | None = None,
        *,
        context: str | None = None,
        seed: int = 0,
    ) -> pd.DataFrame | AnnData:
        """Predict perturbations, seen or not, of any number of genes that were each seen perturbed.

        Parameters
        ----------
        perturbations
            Labels such as `A+B+C`.
        control_cells
            Cells to start from; None takes the control cells of training.
        n_cells
            Cells to generate for each perturbation; None predicts means.
        context
            Context whose control cells are taken; needed where training had several and no `control_cells` are given.
        seed
            Of the draws.

        Returns
        -------
        pandas.DataFrame or anndata.AnnData
            Mean log-normalised expression (n_perturbations, n_genes); or, with `n_cells`, generated cells
            (n_perturbations · n_cells, n_genes) with their label in `obs`.

        Raises
        ------
        UnseenPerturbationError
            If a gene was perturbed in no training cell.
        MethodError
            If there are no control cells, or the context is unknown or not named.
        """
        self._require_fit()
        names = list(self._canonical(np.asarray(perturbations, dtype=object)))
        method, where = self._start_from(control_cells, context, seed)
        genes = list(self.method.genes)
        if n_cells is None:
            means = [method.predict_mean(name, where, seed=seed) for name in names]
            return pd.DataFrame(np.stack(means), index=pd.Index(names, name="perturbation"), columns=genes)
        from anndata import AnnData

        cells = np.concatenate([method.sample_cells(name, where, n_cells, seed=seed) for name in names])
        obs = pd.DataFrame({self.keys.perturbation_key: pd.Categorical(np.repeat(names, n_cells))})
        obs.index = pd.Index([f"{name}-{i}" for name in names for i in range(n_cells)])
        return AnnData(X=cells, obs=obs, var=pd.DataFrame(index=genes))

    def _start_from(self, cells: AnnData | None, context: str | None, seed: int) -> tuple[PerturbedVAE, str]:
        if cells is not None:
            counts = self._counts(cells, self.method.genes) if self.method.needs_counts else None
            method = self.method.with_controls(self._expression(cells, self.method.genes), counts, seed=seed)
            return method, method.contexts[0]
        known = self.method.contexts
        if context is None and len(known) > 1:
            raise MethodError(f"context: training had several; name one of {', '.join(known)}")
        return self.method, known[0] if context is None else context

    # --- keeping ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the fitted model to a folder: `config.json`, `state.pt`. The cells are not in it."""
        self._require_fit()
        save_model(folder, self.method, SPEC, {"seed": self._seed, "keys": self.keys.model_dump(mode="json")})

    @classmethod
    def load(cls, folder: str | Path, adata: AnnData | None = None) -> PerturbedVAEModel:
        """Load a model that `save` or `perturbed fit` wrote.

        Parameters
        ----------
        folder
            The folder.
        adata
            Cells that `get_latent_representation` takes where none are passed.

        Raises
        ------
        DataError
            If the folder holds no readable model, or another method's.
        """
        method = load_model(folder)
        if not isinstance(method, PerturbedVAE):
            raise DataError(f"{folder}: holds a {type(method).__name__}, no PerturbedVAE; use perturbed.models.base")
        extra = json.loads((Path(folder) / "config.json").read_text())["extra"]
        model = cls.__new__(cls)
        model.keys = parse(AnnDataKeys, extra.get("keys", {}), f"{folder}/config.json")
        model.method, model.adata, model.history = method, adata, pd.DataFrame()
        model._data, model._seed = None, extra.get("seed", 0)
        return model

    # --- reading ----------------------------------------------------------------------------------------------------

    def _require_fit(self) -> None:
        if self._seed is None:
            raise MethodError("this PerturbedVAE is not fitted; call fit() first")

    def _read(self, adata: AnnData) -> TrainingData:
        genes = tuple(map(str, adata.var_names))
        if len(set(genes)) < len(genes):
            raise DataError("adata: var_names hold repeats; call var_names_make_unique() first")
        n_cells = adata.n_obs
        counts = self._counts(adata, genes) if self.method.needs_counts else None
        context = np.full(n_cells, ALL, dtype=object)
        if self.keys.context_key is not None:
            context = _column(adata, self.keys.context_key)
        return TrainingData(
            X=self._expression(adata, genes),
            perturbation=self._labels(adata),
            context=context,
            is_val=np.zeros(n_cells, dtype=bool),
            genes=genes,
            centre=np.zeros(len(genes)),
            loadings=np.zeros((len(genes), 0)),
            counts=counts,
            library=None if counts is None else np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
            cells=adata.obs_names.to_numpy(dtype=object),
        )

    def _labels(self, adata: AnnData) -> np.ndarray:
        return self._canonical(_column(adata, self.keys.perturbation_key))

    def _canonical(self, labels: np.ndarray) -> np.ndarray:
        return canonical_labels(labels, Keys(control=(self.keys.control, "control")), where="labels")

    def _expression(self, adata: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
        values = _matrix(adata, self.keys.layer, genes)
        where = f"layer {self.keys.layer!r}" if self.keys.layer else "X"
        if values.nnz and bool((values.data == np.round(values.data)).all()):
            raise DataError(f"adata: {where} holds whole numbers only; log-normalise it, or name the layer that is")
        return values

    def _counts(self, adata: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
        if self.keys.counts_layer is None:
            raise DataError("counts_layer: a count likelihood needs the layer with the counts; name it")
        return _matrix(adata, self.keys.counts_layer, genes)


def _column(adata: AnnData, key: str) -> np.ndarray:
    if key not in adata.obs:
        raise DataError(f"adata: obs has no column {key!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}")
    return adata.obs[key].astype(str).to_numpy(dtype=object)


def _matrix(adata: AnnData, layer: str | None, genes: Sequence[str]) -> sparse.csr_matrix:
    """A matrix of an AnnData on the given genes, in their order, CSR float32 without explicit zeros."""
    if layer is not None and layer not in adata.layers:
        raise DataError(f"adata: no layer {layer!r}; it has {', '.join(map(str, adata.layers)) or 'none'}")
    columns = adata.var_names.get_indexer(pd.Index(genes))
    if (columns < 0).any():
        raise DataError(
            f"adata: gene {genes[int(np.argmin(columns))]!r} of the model is missing; add it, zero if unseen"
        )
    values = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32)
    if not np.array_equal(columns, np.arange(values.shape[1])):
        values = values[:, columns]
    if not bool(np.isfinite(values.data).all()) or bool((values.data < 0).any()):
        name = f"layer {layer!r}" if layer else "X"
        raise DataError(f"adata: {name} holds negative or missing values; pass it neither scaled nor centred")
    values.eliminate_zeros()
    return values


def _with_components(data: TrainingData, seed: int) -> TrainingData:
    """The data with the principal components that partners are matched on, from their training cells."""
    from perturbed.data.features import fit_pca

    train = data.X[np.flatnonzero(~data.is_val)]
    centre = np.asarray(train.mean(axis=0), dtype=np.float64).ravel()
    return replace(data, centre=centre, loadings=fit_pca(train, centre, N_COMPONENTS, seed))


def _resolve(device: str) -> str:
    from perturbed.device import choose_device

    return choose_device(device).name
