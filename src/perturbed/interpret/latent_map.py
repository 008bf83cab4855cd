"""Maps of latents of held-out cells: t-SNE for the eye, shares of like neighbours for the judgement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.contracts import open_prepared, read_split
from perturbed.data.matrices import read_rows
from perturbed.errors import ConfigError, DataError, MethodError, suggest
from perturbed.models.base import Method, load_model
from perturbed.study_config import LatentMap

N_NEIGHBOURS = 15
"""Neighbours in the latent space itself whose likeness is counted."""


def map_latents(
    prepared: Path, split: Path, features: Path, models: Mapping[str, Path], study: LatentMap
) -> pd.DataFrame:
    """t-SNE of the latents of a split's test cells, control cells included.

    Parameters
    ----------
    prepared, split
        `prepared.h5ad` and `split.csv`.
    features
        Not read; the model holds its genes. Named so that the stage waits for them.
    models
        Fitted models by name; what stands after an `@` in a name is dropped.
    study
        Which latents, colours and cells.

    Returns
    -------
    pandas.DataFrame
        One row per method and cell: `method`, `cell`, `x`, `y`, the colour columns, and for each colour column C
        `like_C` (mean share of a cell's nearest neighbours in the latent space that have the cell's value) and
        `chance_C` (the same for neighbours drawn at random).

    Raises
    ------
    ConfigError
        If a colour is no column of `obs`.
    DataError
        If fewer than 10 test cells are there.
    MethodError
        If a model has no such latents.
    """
    from sklearn.manifold import TSNE

    cells = open_prepared(prepared)
    for name in study.colours:
        if name not in cells.obs:
            raise ConfigError(f"studies: colours: {prepared} has no obs column {name!r}; {suggest(name, cells.obs)}")
    table = read_split(split).table
    chosen = _draw(table.index[table["part"] == "test"], study, str(split))
    rows = np.sort(cells.obs.index.get_indexer(chosen))
    X, obs = read_rows(cells.X, rows), cells.obs.iloc[rows]
    blocks = []
    for name, path in models.items():
        method = load_model(path)
        columns = cells.var.index.get_indexer(pd.Index(method.genes))
        latents = _latents(method, sparse.csr_matrix(X[:, columns]), list(obs.index), study.latent, str(path))
        tsne = TSNE(perplexity=min(study.perplexity, (len(rows) - 1) / 3), init="pca", random_state=study.seed)
        place = tsne.fit_transform(latents.astype(np.float64))
        block = pd.DataFrame({"method": name.partition("@")[0], "cell": obs.index, "x": place[:, 0], "y": place[:, 1]})
        neighbours = _nearest(latents)
        for column in study.colours:
            values = obs[column].astype(str).to_numpy()
            like, chance = _likeness(values, neighbours)
            block = block.assign(**{column: values, f"like_{column}": like, f"chance_{column}": chance})
        blocks.append(block)
    return pd.concat(blocks, ignore_index=True)


def _draw(names: pd.Index, study: LatentMap, where: str) -> pd.Index:
    if len(names) < 10:
        raise DataError(f"{where}: {len(names)} test cells are too few for a map; take another split")
    rng = np.random.default_rng([study.seed, 43])
    return names if len(names) <= study.n_cells else names[rng.choice(len(names), study.n_cells, replace=False)]


def _latents(method: Method, X: sparse.csr_matrix, cells: list[str], latent: str, where: str) -> np.ndarray:
    if latent == "encoder":
        return method.represent_cells(X, cells)
    background = getattr(method, "encode_background", None)
    if background is None:
        raise MethodError(f"{where}: {type(method).__name__} has no background latents; take `latent: encoder`")
    return np.asarray(background(X))


def _nearest(latents: np.ndarray) -> np.ndarray:
    """Positions of each cell's nearest neighbours, the cell itself left out (n_cells, k)."""
    from sklearn.neighbors import NearestNeighbors

    k = min(N_NEIGHBOURS, len(latents) - 1)
    return NearestNeighbors(n_neighbors=k).fit(latents).kneighbors(return_distance=False)


def _likeness(values: np.ndarray, neighbours: np.ndarray) -> tuple[float, float]:
    """Mean share of neighbours with a cell's own value, and its expectation for random neighbours."""
    like = float((values[neighbours] == values[:, None]).mean())
    n = np.unique(values, return_counts=True)[1].astype(float)
    return like, float((n * (n - 1)).sum() / (len(values) * (len(values) - 1)))
