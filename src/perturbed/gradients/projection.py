"""Cells and their arrows in two dimensions, to draw: the latents themselves, principal components, or a UMAP."""

from __future__ import annotations

import warnings

import numpy as np

MAX_CELLS = 5000
"""Cells kept to draw."""
MAX_UMAP = 2000
"""Cells that a UMAP is made of."""
MAX_MOVED = 400
"""Cells whose arrows are placed in the UMAP."""


def draw_rows(n_cells: int, most: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """At most so many cells at random, ascending; `among` restricts them (positions)."""
    pool = np.arange(n_cells) if among is None else among
    return np.sort(np.random.default_rng(seed).permutation(pool)[:most])


def project_linearly(z: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and arrows (n_cells, 2) each: the latents where there are two, else on their principal components.

    Components are turned so that the largest loading is positive.

    Parameters
    ----------
    z, velocity
        (n_cells, n_latent).
    """
    if z.shape[1] <= 2:
        basis, centre = np.eye(z.shape[1], 2), np.zeros(z.shape[1])
    else:
        centre = z.mean(axis=0)
        basis = np.linalg.svd(z - centre, full_matrices=False)[2][:2].T
        basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), [0, 1]])
    return (z - centre) @ basis, velocity @ basis


def project_by_umap(z: np.ndarray, start: np.ndarray, end: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """UMAP of cells, and where some of them and their stepped versions come to lie in it.

    Both ends of an arrow are placed by `umap.transform`, because a cell's own place in the embedding and the place
    that `transform` gives it differ by noise that is as long as a short arrow.

    Parameters
    ----------
    z
        Latents of the cells embedded (n_cells, n_latent).
    start, end
        Latents before and after the steps (n_moved, n_latent).
    seed
        Of the embedding; one thread, so equal seeds are equal pictures.

    Returns
    -------
    place
        (n_cells, 2).
    ends
        (2, n_moved, 2): before and after.
    """
    from umap import UMAP  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        mapper = UMAP(n_neighbors=min(15, len(z) - 1), random_state=seed, n_jobs=1).fit(z)
        ends = mapper.transform(np.vstack([start, end]))
    return np.asarray(mapper.embedding_), np.stack([ends[: len(start)], ends[len(start) :]])
