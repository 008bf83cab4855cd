"""What of a case needs expression itself, read from disk in chunks: correlation with an axis, errors of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from perturbed.data.contracts import open_prepared
from perturbed.data.matrices import read_rows
from perturbed.gradients.cells import CHUNK, LatentCells
from perturbed.models.nb_vae import NBVAE, encoder_input


def read_genes(
    prepared: str | Path, genes: tuple[str, ...], rows: np.ndarray
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Log-normalised expression of some cells, chunk by chunk.

    Parameters
    ----------
    prepared
        `prepared.h5ad`.
    genes
        Its genes, by name.
    rows
        Cells by position, ascending (n_cells,).

    Yields
    ------
    place
        Which of `rows` (n_chunk,).
    X
        CSR (n_chunk, n_genes).
    """
    adata = open_prepared(prepared)
    columns = adata.var_names.get_indexer(list(genes))
    for start in range(0, len(rows), CHUNK):
        place = np.arange(start, min(len(rows), start + CHUNK))
        yield place, sparse.csr_matrix(read_rows(adata.X, rows[place])[:, columns].astype(np.float32))


def correlate_genes(
    prepared: str | Path, genes: tuple[str, ...], projections: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Pearson correlation of every gene's log-normalised expression with a number per cell, for several sets of cells.

    The plain rival of a gradient: a gene that merely varies along an axis among unperturbed cells has a high one.

    Parameters
    ----------
    prepared, genes
        The cells.
    projections
        By name: cells by position, ascending (n_cells,), and their projection on the axis (n_cells,).

    Returns
    -------
    dict
        By name (n_genes,); NaN for genes that do not vary.
    """
    found = {}
    for name, (rows, values) in projections.items():
        centred = values - values.mean()
        total, squares, cross = np.zeros(len(genes)), np.zeros(len(genes)), np.zeros(len(genes))
        for place, X in read_genes(prepared, genes, rows):
            wide = X.astype(np.float64)
            total += np.asarray(wide.sum(axis=0)).ravel()
            squares += np.asarray(wide.multiply(wide).sum(axis=0)).ravel()
            cross += wide.T @ centred[place]
        spread = np.sqrt(np.maximum(squares - total**2 / len(rows), 0)) * np.linalg.norm(centred)
        found[name] = np.divide(cross, spread, out=np.full(len(genes), np.nan), where=spread > 1e-12)
    return found


@torch.no_grad()
def reconstruction_errors(method: NBVAE, prepared: str | Path, cells: LatentCells) -> Iterator[dict[str, Any]]:
    """Errors of the decoded posterior mean, by part of the split, over all cells and genes of the decoder.

    On the scale of the encoder's input: `log(1 + counts / mean count)` for counts, log-normalised expression else. The
    mean squared error is what the authors' code calls rmse.
    """
    parts = cells.obs["part"].to_numpy()
    counts = method.params.likelihood == "nb"
    for part in ("train", "val", "test"):
        rows = np.flatnonzero(parts == part)
        if not len(rows):
            continue
        squared, absolute = 0.0, 0.0
        for place, X in read_genes(prepared, method.genes, rows):
            seen = encoder_input(X, method.params.likelihood).toarray()
            latents = cells.encoded.mean[torch.from_numpy(rows[place])]
            decoded = method.module.expression(method.module.activations(latents)[0]).numpy()
            error = seen - (np.log1p(decoded) if counts else decoded)
            squared, absolute = squared + float((error**2).sum()), absolute + float(np.abs(error).sum())
        size = len(rows) * len(method.genes)
        for metric, value in (("mse_log1p_scaled", squared / size), ("mae_log1p_scaled", absolute / size)):
            name = metric if counts else metric.replace("log1p_scaled", "log_normalised")
            yield {"part": part, "metric": name, "value": value, "n_cells": len(rows), "note": ""}
