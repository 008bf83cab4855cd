"""The one door of every method: `fit` on training cells, `predict` perturbations, save and load without pickles.

A method is one class here and one file in `config/methods`. Adding one touches nothing else. torch is imported
only where a method's state holds tensors: importing it takes longer than fitting a baseline.
"""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import Section, parse
from perturbed.data.contracts import Prediction
from perturbed.errors import ConfigError, DataError, MethodError, UnseenPerturbationError
from perturbed.files import atomic, write_json
from perturbed.models.spec import MethodSpec, load_method_spec
from perturbed.names import CONTROL, genes_of, join_genes

__all__ = [
    "FitRun",
    "Method",
    "MethodSpec",
    "TrainingData",
    "build",
    "load_method_spec",
    "load_model",
    "method_class",
    "require_seen",
    "save_model",
]


ARRAYS, TENSORS = "state.npz", "state.pt"
"""Names of the two forms of a saved state."""


@dataclass(frozen=True)
class TrainingData:
    """Everything a method may see: the training and validation cells of one split, on the split's genes.

    Parameters
    ----------
    X
        Log-normalised expression, CSR float32 (n_cells, n_genes).
    perturbation
        Canonical name per cell (n_cells,).
    context
        Context per cell (n_cells,); all equal where the data have one.
    is_val
        True for the cells set aside for early stopping (n_cells,).
    genes
        Gene names of the columns.
    centre, loadings
        Training mean (n_genes,) and PCA loadings (n_genes, n_pcs) of the split's features.
    counts
        Raw counts on the same genes, CSR float32, or None where the source has none.
    library
        Total counts of each cell over all genes (n_cells,), or None.
    covariates
        Further columns of `obs`, one row per cell.
    cells
        Names of the cells (n_cells,), to find their rows in a file of cell embeddings.
    files
        The dataset's side files by role (`gene_sets`, `gene_graph`, `gene_embedding`, `cell_embedding`).
    """

    X: sparse.csr_matrix
    perturbation: np.ndarray
    context: np.ndarray
    is_val: np.ndarray
    genes: tuple[str, ...]
    centre: np.ndarray
    loadings: np.ndarray
    counts: sparse.csr_matrix | None = None
    library: np.ndarray | None = None
    covariates: pd.DataFrame = field(default_factory=pd.DataFrame)
    cells: np.ndarray = field(default_factory=lambda: np.array([], dtype=object))
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def seen_genes(self) -> tuple[str, ...]:
        """All genes perturbed in any training cell, sorted."""
        return tuple(sorted({gene for name in set(self.perturbation) for gene in genes_of(name)}))


@dataclass(frozen=True)
class FitRun:
    """The circumstances of one fit: what changes from run to run but is no hyper-parameter."""

    seed: int = 0
    device: str = "cpu"
    checkpoint: Path | None = None
    """Where training keeps its last checkpoint, to resume exactly from; None keeps none."""
    history: Callable[[Mapping[str, float]], None] | None = None
    """Called once an epoch with the terms of the loss."""
    progress: bool = True
    threads: int = 1
    """Cores to work on; never changes the result."""
    notes: list[str] = field(default_factory=list)
    """What the record should say beside the device; training adds to it."""


class Method(ABC):
    """Base of all methods.

    Class attributes declare capabilities, so that a run can be planned before anything is fitted.
    """

    Params: ClassVar[type[Section]]
    """The method's hyper-parameters, one frozen model."""
    needs_counts: ClassVar[bool] = False
    """True where the likelihood is one of counts; may be overridden per instance by `check`."""
    stochastic: ClassVar[bool] = False
    """True where another seed gives another fit."""
    uses_torch: ClassVar[bool] = False
    """True where torch is imported only while fitting; torch that comes with the class's module is noticed anyway."""
    streams: ClassVar[bool] = False
    """True where the method can leave `X` and `counts` on disk (`perturbed.data.streaming.StreamedMatrix`)."""
    parallel: ClassVar[bool] = False
    """True where the method trains in several processes (`perturbed.distributed`); may be overridden per instance."""

    def __init__(self, params: Section | None = None) -> None:
        self.params = params if params is not None else self.Params()

    def check(self, data: TrainingData) -> None:
        """Refuse data the method cannot run on, before any work.

        Raises
        ------
        MethodError
            If the method needs counts and the data have none, or no control cell is there.
        """
        if self.needs_counts and data.counts is None:
            raise MethodError(
                f"{type(self).__name__} has a count likelihood, but these data hold no counts "
                "(already normalised by their source); choose a Gaussian likelihood or a method without counts"
            )
        for context in sorted(set(data.context)):
            if not ((data.perturbation == CONTROL) & (data.context == context)).any():
                raise MethodError(f"context {context!r} has no control cells in training; every method needs them")

    def require_file(self, data: TrainingData, role: str) -> Path:
        """The side file of a role.

        Raises
        ------
        MethodError
            If the dataset's card names none.
        """
        if role not in data.files:
            raise MethodError(f"{type(self).__name__} needs a {role} file; name it in the card, under files.{role}")
        return data.files[role]

    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Frozen representation of cells that never sees their condition (n_cells, n_dimensions).

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).

        Raises
        ------
        MethodError
            If the method has none.
        """
        raise MethodError(f"{type(self).__name__} has no representation of cells to probe")

    def represent_cells(self, X: sparse.csr_matrix, cells: Sequence[str]) -> np.ndarray:
        """`represent`, for methods that look cells up by name instead of encoding their expression.

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).
        cells
            Names of the cells (n_cells,).
        """
        return self.represent(X)

    @abstractmethod
    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Learn from training (and, for early stopping, validation) cells."""

    @abstractmethod
    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Predict one perturbation: `mean` (n_genes,), and where available `variance` (n_genes,), `cells` (n, n_genes).

        Raises
        ------
        UnseenPerturbationError
            If the method has no way to predict a gene it never saw.
        """

    @property
    @abstractmethod
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions, known after `fit` or `load_state`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All learned arrays, by name: numpy arrays (saved as `state.npz`) or torch tensors (saved as `state.pt`).

        A mixture is saved as tensors, and all of it comes back as tensors.
        """

    def meta(self) -> dict[str, Any]:
        """Learned things that are no tensors (names), as JSON values."""
        return {}

    @abstractmethod
    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore what `state` and `meta` returned."""

    def predict(self, targets: Sequence[tuple[str, str]], *, seed: int = 0) -> Prediction:
        """Predict `(perturbation, context)` pairs; those the method cannot predict are listed in `refused`.

        The genes of a combination may stand in any order.
        """
        done: list[tuple[str, str, dict[str, np.ndarray]]] = []
        refused: dict[str, str] = {}
        for perturbation, context in targets:
            try:
                found = self.predict_one(join_genes(genes_of(perturbation)), context, seed=seed)
                done.append((perturbation, context, found))
            except UnseenPerturbationError as error:
                refused[perturbation] = str(error)
        blank = np.zeros((0, len(self.genes)), dtype=np.float32)
        has = {key: bool(done) and all(key in values for *_, values in done) for key in ("variance", "cells")}
        return Prediction(
            mean=np.stack([values["mean"] for *_, values in done]).astype(np.float32) if done else blank,
            genes=self.genes,
            perturbation=tuple(perturbation for perturbation, *_ in done),
            context=tuple(context for _, context, _ in done),
            variance=np.stack([values["variance"] for *_, values in done]) if has["variance"] else None,
            cells=tuple(values["cells"] for *_, values in done) if has["cells"] else None,
            refused=refused,
        )


def method_class(spec: MethodSpec) -> type[Method]:
    """The class that a method file names."""
    module, _, attribute = spec.implementation.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"implementation {spec.implementation!r} cannot be imported ({error}); correct it") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"implementation {spec.implementation!r} is no perturbed.models.base.Method")
    return found


def build(spec: MethodSpec, overrides: Mapping[str, Any] | None = None) -> Method:
    """An unfitted method from its file, with the run's overrides."""
    found = method_class(spec)
    return found(parse(found.Params, {**spec.params, **(overrides or {})}, f"method {spec.title}"))


def save_model(folder: str | Path, method: Method, spec: MethodSpec, extra: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` and the state, whole or not at all; equal models are equal bytes.

    The state is `state.npz` where the method keeps numpy arrays, `state.pt` where it keeps tensors.
    """
    state = method.state()
    with atomic(folder) as part:
        part.mkdir()
        content = {**spec.model_dump(), "params": method.params.model_dump(mode="json"), "meta": method.meta()}
        write_json(part / "config.json", {**content, "extra": dict(extra or {})})
        if all(isinstance(value, np.ndarray) for value in state.values()):
            (part / ARRAYS).write_bytes(_pack_arrays(state))
        else:
            (part / TENSORS).write_bytes(_pack_tensors(state))


def _pack_arrays(state: Mapping[str, np.ndarray]) -> bytes:
    """An npz of arrays in the order of their names; members carry a fixed date, so equal arrays are equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(state):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(state[key], order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), member.getvalue())
    return buffer.getvalue()


def _pack_tensors(state: Mapping[str, Any]) -> bytes:
    import torch

    tensors = {key: torch.as_tensor(value).detach().cpu().contiguous() for key, value in state.items()}
    buffer = io.BytesIO()  # torch writes the name of a file into it; a buffer has none
    torch.save(tensors, buffer)
    return buffer.getvalue()


def load_model(folder: str | Path) -> Method:
    """Load a fitted method; nothing but arrays and tensors is ever unpickled."""
    folder = Path(folder)
    try:
        content = json.loads((folder / "config.json").read_text())
        state = _read_state(folder)
    except Exception as error:  # torch, numpy and zip raise many kinds for a broken file
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{folder}: not a readable model ({reason}); delete it and rerun `perturbed fit`") from None
    meta = content.pop("meta")
    content.pop("extra", None)
    spec = parse(MethodSpec, content, str(folder / "config.json"))
    method = build(spec)
    method.load_state(state, meta)
    return method


def _read_state(folder: Path) -> dict[str, Any]:
    if (folder / ARRAYS).is_file():
        with np.load(folder / ARRAYS, allow_pickle=False) as archive:
            return dict(archive)
    import torch

    return dict(torch.load(folder / TENSORS, weights_only=True, map_location="cpu"))


def require_seen(perturbation: str, seen: Sequence[str], method: str) -> tuple[str, ...]:
    """The genes of `perturbation`, if all were seen in training.

    Raises
    ------
    UnseenPerturbationError
        Names the genes that were not.
    """
    genes = genes_of(perturbation)
    unseen = [gene for gene in genes if gene not in set(seen)]
    if unseen:
        raise UnseenPerturbationError(f"{method} never saw {', '.join(unseen)} perturbed in training")
    return genes
