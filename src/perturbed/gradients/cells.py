"""Cells of a prepared file in a decoder's latent space, read from disk in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbed.data.contracts import open_prepared, read_features, read_split
from perturbed.data.matrices import read_rows
from perturbed.decoders.base import Decoder, Encoded
from perturbed.decoders.nb_vae import NBVAEDecoder
from perturbed.decoders.perturbedvae import PerturbedVAEDecoder
from perturbed.errors import ConfigError, DataError, suggest
from perturbed.gradients.spec import CellGroup
from perturbed.models.base import Method

CHUNK = 8192
"""Cells read and encoded at a time."""


class LatentCells(NamedTuple):
    """Cells in latent space, with what is known of them."""

    obs: pd.DataFrame
    """Annotation, with the split's `part`, in the order of the file."""
    encoded: Encoded
    """Posterior and context."""
    mean: np.ndarray
    """Mean log-normalised expression of each gene over all cells (n_genes,)."""
    variance: np.ndarray
    """Its variance (n_genes,)."""

    @property
    def z(self) -> np.ndarray:
        """Posterior means (n_cells, n_latent)."""
        return np.asarray(self.encoded.mean.numpy())


def decoder_of(method: Method) -> Any:
    """The decoder of a fitted method.

    Raises
    ------
    ConfigError
        If the method has none.
    """
    from perturbed.models.nb_vae import NBVAE
    from perturbed.models.perturbedvae import PerturbedVAE

    if isinstance(method, NBVAE):
        return NBVAEDecoder(method)
    if isinstance(method, PerturbedVAE):
        return PerturbedVAEDecoder(method)
    raise ConfigError(f"{type(method).__name__} has no decoder to differentiate; use nb_vae or perturbedvae")


def encode_cells(
    decoder: Any, prepared: str | Path, split: str | Path | None = None, features: str | Path | None = None
) -> LatentCells:
    """Encode every cell of a prepared file; only one chunk of expression is in memory.

    Parameters
    ----------
    decoder
        A decoder with `encode(X)`.
    prepared
        `prepared.h5ad`.
    split
        `split.csv`, to know which cells trained; None marks all as `unused`.
    features
        `features.csv`; its genes must be the decoder's. None looks the decoder's genes up in the file.

    Raises
    ------
    DataError
        If a gene of the decoder is not in the file.
    """
    adata = open_prepared(prepared)
    if features is not None and tuple(read_features(features).genes) != decoder.genes:
        raise DataError(f"{features}: other genes than the decoder's; use the features that it was fitted with")
    columns = adata.var_names.get_indexer(list(decoder.genes))
    if (columns < 0).any():
        gene = decoder.genes[int(np.flatnonzero(columns < 0)[0])]
        raise DataError(f"{prepared}: gene {gene!r} of the decoder is missing ({int((columns < 0).sum())} in all)")
    obs = adata.obs.copy()
    parts = None if split is None else read_split(split).table["part"]
    obs["part"] = "unused" if parts is None else parts.reindex(obs.index).fillna("unused").astype(str)
    means, sds = [], []
    total, squares = np.zeros(len(columns)), np.zeros(len(columns))
    for start in range(0, len(obs), CHUNK):
        X = read_rows(adata.X, np.arange(start, min(len(obs), start + CHUNK)))[:, columns].astype(np.float32)
        part = decoder.encode(sparse.csr_matrix(X))
        means.append(part.mean)
        sds.append(part.sd)
        total += np.asarray(X.sum(axis=0), dtype=np.float64).ravel()
        squares += np.asarray(X.multiply(X).sum(axis=0), dtype=np.float64).ravel()
    mean = total / len(obs)
    return LatentCells(
        obs, Encoded(torch.cat(means), torch.cat(sds), {}), mean, np.maximum(squares / len(obs) - mean**2, 0)
    )


def select(obs: pd.DataFrame, group: CellGroup) -> np.ndarray:
    """True for the cells of a group (n_cells,).

    Raises
    ------
    DataError
        If the column or a value does not occur.
    """
    values = column_of(obs, group.column)
    for value in group.values:
        if value not in set(values):
            raise DataError(f"no cell has {group.column} {value!r}; {suggest(value, set(values))}")
    return np.isin(values, group.values)


def column_of(obs: pd.DataFrame, column: str) -> np.ndarray:
    """A column as text (n_cells,).

    Raises
    ------
    DataError
        If there is no such column.
    """
    if column not in obs:
        raise DataError(
            f"no column {column!r}; name it in the card's keys.keep ({suggest(column, map(str, obs.columns))})"
        )
    return np.asarray(obs[column].astype(str), dtype=object)


__all__ = ["Decoder", "LatentCells", "column_of", "decoder_of", "encode_cells", "select"]
