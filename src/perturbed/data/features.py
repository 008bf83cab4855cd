"""The stage `features`: the genes of a split, their scaling and a PCA, from its training cells only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import FeatureSpec
from perturbed.data.contracts import Features, Split
from perturbed.data.matrices import column_counts, column_moments, read_rows, row_blocks
from perturbed.data.streaming import StreamedMatrix, row_lengths
from perturbed.errors import DataError
from perturbed.names import genes_of

if TYPE_CHECKING:
    from anndata import AnnData

_EXACT = 2000
"""Up to this many cells or genes, the PCA is an exact eigendecomposition of the smaller side."""
_LARGE = 250_000_000
"""Beyond so many stored values (2 GB) the training cells stay on disk; where the chosen genes alone hold more, the PCA
is of `_PCA_CELLS` of them. A number, not the memory at hand, so that every machine makes the same features."""
_PCA_CELLS = 50_000
_N_BINS = 20


def compute_features(prepared: AnnData, split: Split, spec: FeatureSpec) -> Features:
    """Genes, scaling and PCA from the cells whose part is `train`; validation cells are not looked at.

    Genes: the `n_hvg` most variable ones, those of `keep_genes` and, with `keep_perturbed`, those perturbed in
    training, in the order of the prepared file. Mean and standard deviation (population) are plain ones over training
    cells. The PCA is of the centred, unscaled values; `n_pcs` is capped at the rank. Where the chosen genes
    of the training cells hold more than 250 million values, the PCA is of 50,000 of these cells, drawn by `spec.seed`.

    Parameters
    ----------
    prepared
        The prepared data; may be backed, and then only rows of training cells are read.
    split
        The split; its `sha256` goes into the header.
    spec
        What to compute.

    Returns
    -------
    Features
        With `split_sha256`, `upstream`, `spec` and `n_cells` in the header; and `pca_cells` where those are fewer.

    Raises
    ------
    DataError
        If cells of the split are not in the data, or training cells do not vary.
    """
    rows = training_rows(prepared, split)
    train = _training_cells(prepared.X, rows)
    seen = {gene for name in set(split.table.loc[split.cells("train"), "perturbation"]) for gene in genes_of(name)}
    chosen = choose_genes(train, prepared.var, spec, seen)
    values = _take_columns(train, chosen)
    sampled = _draw_pca_cells(values, spec.seed)
    del train
    mean, variance = column_moments(values)
    loadings = fit_pca(values if sampled is None else values[sampled], mean, spec.n_pcs, spec.seed)
    table = pd.DataFrame({"mean": mean, "sd": np.sqrt(variance)}, index=prepared.var_names[chosen].rename("gene"))
    names = [f"pc{i + 1}" for i in range(loadings.shape[1])]
    table = pd.concat([table, pd.DataFrame(loadings, index=table.index, columns=names)], axis=1)
    header = {
        "split_sha256": split.header.get("sha256"),
        "upstream": bool(prepared.uns["perturbed"]["upstream_genes"]),
        "spec": spec.model_dump(mode="json"),
        "n_cells": len(rows),
    }
    return Features(table, header if sampled is None else {**header, "pca_cells": len(sampled)})


def _training_cells(matrix: Any, rows: np.ndarray) -> Any:
    """The training cells as CSR, or left on disk where they are many."""
    on_disk = hasattr(matrix, "group") and getattr(matrix, "format", "csr") == "csr"
    if on_disk and row_lengths(matrix, rows).sum() > _LARGE:
        return StreamedMatrix(matrix, rows)
    return read_rows(matrix, rows)


def _take_columns(train: Any, chosen: np.ndarray) -> Any:
    """The chosen genes; in memory where they fit, though all genes did not."""
    if isinstance(train, StreamedMatrix):
        values = train.with_columns(chosen)
        n_stored = train.nnz if values.columns is None else column_counts(train)[chosen].sum()
        return values if n_stored > _LARGE else values[np.arange(train.shape[0])]
    return train[:, chosen] if len(chosen) < train.shape[1] else train


def _draw_pca_cells(values: Any, seed: int) -> np.ndarray | None:
    """Rows of the training cells that the PCA is of, ascending; None for all."""
    n_cells, is_large = values.shape[0], isinstance(values, StreamedMatrix) or values.nnz > _LARGE
    if not is_large or n_cells <= _PCA_CELLS:
        return None
    rng = np.random.default_rng([seed & 0xFFFFFFFF, 1])
    return np.sort(rng.choice(n_cells, _PCA_CELLS, replace=False))


def training_rows(prepared: AnnData, split: Split) -> np.ndarray:
    """Positions of the training cells in the prepared data, ascending.

    Raises
    ------
    DataError
        If cells of the split are not in the data.
    """
    cells = split.cells("train")
    rows = prepared.obs_names.get_indexer(cells)
    if (rows < 0).any():
        raise DataError(
            f"split: {int((rows < 0).sum())} training cells are not in the prepared data, such as "
            f"{cells[rows < 0][0]!r}; rerun `perturbed split` on these data"
        )
    return np.sort(rows)


def choose_genes(train: Any, var: pd.DataFrame, spec: FeatureSpec, perturbed: set[str]) -> np.ndarray:
    """Positions of the genes kept, ascending.

    Parameters
    ----------
    train
        Log-normalised training cells (n_cells, n_genes).
    var
        Gene table; names in the index and `symbol`.
    spec
        `n_hvg`, `keep_perturbed` and `keep_genes`.
    perturbed
        Genes perturbed in training, by name or symbol.
    """
    n_genes = train.shape[1]
    if spec.n_hvg == "all" or spec.n_hvg >= n_genes:
        return np.arange(n_genes)
    names = var.index.astype(str).to_numpy()
    dispersion = normalised_dispersion(train)
    order = np.lexsort((names, -np.where(np.isnan(dispersion), -np.inf, dispersion)))  # ties by name
    kept = np.zeros(n_genes, dtype=bool)
    kept[order[: spec.n_hvg]] = True
    wanted = {*spec.keep_genes, *(perturbed if spec.keep_perturbed else ())}
    kept |= var.index.isin(wanted) | var["symbol"].isin(wanted).to_numpy()
    return np.flatnonzero(kept)


def normalised_dispersion(log_values: Any) -> np.ndarray:
    r"""Normalised dispersion of each gene (n_genes,), NaN for genes without counts.

    With mean :math:`m` and variance :math:`v` (n - 1) of :math:`e^x - 1`, the dispersion is :math:`\log(v / m)`; genes
    are cut into 20 bins of equal width of :math:`\log(1 + m)`, and the dispersion is standardised within its bin. A
    gene alone in its bin gets 1. This is the flavour `seurat` of Satija et al. 2015 (doi:10.1038/nbt.3192), with
    sums whose rounding depends neither on threads nor on a copy of the matrix.
    """
    n_cells = log_values.shape[0]
    mean, variance = column_moments(log_values, expm1=True)
    variance *= n_cells / max(1, n_cells - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = variance / mean
        raw = np.log(np.where(ratio > 0, ratio, np.nan))
    bins = pd.cut(pd.Series(np.log1p(mean)), bins=_N_BINS, labels=False)
    by_bin = pd.Series(raw).groupby(bins)
    centre, spread = by_bin.transform("mean"), by_bin.transform("std", ddof=1)
    alone = spread.isna()
    centre[alone], spread[alone] = 0.0, centre[alone]
    return ((raw - centre) / spread).to_numpy()


def fit_pca(values: sparse.csr_matrix, mean: np.ndarray, n_pcs: int, seed: int) -> np.ndarray:
    """Loadings of the leading principal components (n_genes, n_pcs), orthonormal, without a dense copy of the data.

    Exact where cells or genes are at most 2,000, by Lanczos iteration from a seeded start else. The largest loading of
    each component, in size, is positive.

    Parameters
    ----------
    values
        Log-normalised cells (n_cells, n_genes).
    mean
        What to subtract (n_genes,).
    n_pcs
        Capped at the rank of the centred values.
    seed
        Of the starting vector.

    Raises
    ------
    DataError
        If the cells do not vary.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n_cells, n_genes = values.shape
    with threadpool_limits(1):  # the rounding of BLAS depends on its threads
        if n_genes <= _EXACT:
            squares, vectors = np.linalg.eigh(_covariance(values, mean))
            squares, loadings = squares[::-1], vectors[:, ::-1]
        elif n_cells <= _EXACT:
            squares, vectors = np.linalg.eigh(_gram(values, mean))
            squares, vectors = squares[::-1], vectors[:, ::-1]
            loadings = _unproject(values, mean, vectors[:, :n_pcs])
        else:
            squares, loadings = _lanczos(values, mean, n_pcs, seed)
    rank = int((squares > squares.max(initial=0.0) * 1e-12).sum())
    n_kept = min(n_pcs, rank, n_cells - 1, n_genes)
    if n_kept < 1:
        raise DataError(
            "features: the training cells do not vary, so they have no principal component; check the split"
        )
    loadings = loadings[:, :n_kept] / np.linalg.norm(loadings[:, :n_kept], axis=0)
    top = loadings[np.argmax(np.abs(loadings), axis=0), np.arange(n_kept)]
    return loadings * np.where(top < 0, -1.0, 1.0)


def _covariance(values: sparse.csr_matrix, mean: np.ndarray) -> np.ndarray:
    """Sum over cells of the centred values' outer products (n_genes, n_genes), by blocks of cells."""
    total = np.zeros((values.shape[1], values.shape[1]))
    for rows in row_blocks(values, dense=True):
        block = values[rows].toarray().astype(np.float64) - mean
        total += block.T @ block
    return total


def _gram(values: sparse.csr_matrix, mean: np.ndarray) -> np.ndarray:
    """Inner products of the centred cells (n_cells, n_cells)."""
    wide = values.astype(np.float64)
    cross = wide @ mean
    return (wide @ wide.T).toarray() - cross[:, None] - cross[None, :] + mean @ mean


def _unproject(values: sparse.csr_matrix, mean: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Gene side of the cells' singular vectors: centred values transposed, times vectors."""
    return values.astype(np.float64).T @ vectors - np.outer(mean, vectors.sum(axis=0))


def _lanczos(values: sparse.csr_matrix, mean: np.ndarray, n_pcs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse.linalg import LinearOperator, svds

    wide = values.astype(np.float64)
    turned = wide.T
    n_cells, n_genes = values.shape

    def apply(vector: np.ndarray) -> np.ndarray:
        vector = vector.ravel()  # scipy passes a column at times
        return wide @ vector - mean @ vector

    def apply_transposed(vector: np.ndarray) -> np.ndarray:
        vector = vector.ravel()
        return turned @ vector - mean * vector.sum()

    operator: Any = LinearOperator((n_cells, n_genes), matvec=apply, rmatvec=apply_transposed, dtype=np.float64)
    start = np.random.default_rng([seed & 0xFFFFFFFF, 0]).standard_normal(min(n_cells, n_genes))
    _, singular, vectors = svds(operator, k=min(n_pcs, min(n_cells, n_genes) - 1), v0=start, solver="arpack")
    return singular[::-1] ** 2, vectors[::-1].T
