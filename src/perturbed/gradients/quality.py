"""How good a decoder is, by the paper's measures under their right names.

What the authors' code calls `rmse` and `mae` are the mean squared and the mean absolute error of log(1 + scaled
expression); ARI is that of the best k-means clustering of the latent means against an annotation.
"""

from __future__ import annotations

import numpy as np


def best_kmeans_ari(z: np.ndarray, labels: np.ndarray, *, seed: int = 0, most: int = 20) -> tuple[float, int]:
    """Adjusted Rand index of the best k-means clustering, and its k.

    Parameters
    ----------
    z
        Posterior means (n_cells, n_latent).
    labels
        Annotation (n_cells,).
    seed
        Of k-means.
    most
        Largest k tried, from 2. Choosing k by the labels flatters, as the paper does; it is a ceiling.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    best, chosen = -1.0, 0
    for k in range(2, min(most, len(z) - 1) + 1):
        found = KMeans(k, n_init=3, random_state=seed).fit_predict(z)
        score = float(adjusted_rand_score(labels, found))
        if score > best:
            best, chosen = score, k
    return best, chosen


def head_scores(kind: str, predicted: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Scores of a head on cells with a known label.

    Parameters
    ----------
    kind
        `binary` (logits against 0/1: AUC, accuracy, F1) or `continuous` (Spearman, mean absolute error).
    predicted, label
        (n_cells,).
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    if kind == "binary":
        hard = predicted > 0
        both = len(np.unique(label)) == 2
        return {
            "auc": float(roc_auc_score(label, predicted)) if both else float("nan"),
            "accuracy": float(accuracy_score(label, hard)),
            "f1": float(f1_score(label, hard, zero_division=0)),
        }
    return {"spearman": float(spearmanr(predicted, label)[0]), "mae": float(np.abs(predicted - label).mean())}


def local_gradient(z: np.ndarray, value: np.ndarray, *, k: int = 30) -> np.ndarray:
    """Local gradient of a value over latent space: slope of a linear fit among each cell's k nearest neighbours.

    Parameters
    ----------
    z
        Latents (n_cells, n_latent).
    value
        Such as the observed time (n_cells,).
    k
        Neighbours; ridge-stabilised least squares, so that k may be near the dimension.

    Returns
    -------
    ndarray
        (n_cells, n_latent).
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(z) - 1)
    neighbours = NearestNeighbors(n_neighbors=k + 1).fit(z).kneighbors(z, return_distance=False)
    slopes = np.empty_like(z, dtype=np.float64)
    for start in range(0, len(z), 4096):
        rows = neighbours[start : start + 4096]
        x = z[rows] - z[rows].mean(axis=1, keepdims=True)
        y = value[rows] - value[rows].mean(axis=1, keepdims=True)
        gram = np.einsum("nki,nkj->nij", x, x)
        ridge = 1e-3 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / z.shape[1]
        gram = gram + (ridge + 1e-12) * np.eye(z.shape[1])
        slopes[start : start + 4096] = np.linalg.solve(gram, np.einsum("nki,nk->ni", x, y)[..., None])[..., 0]
    return slopes
