"""Control cells that resemble a perturbed cell in what a perturbation leaves alone: depth, and position or cycle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import sparse

from perturbed.errors import MethodError
from perturbed.models.base import TrainingData

Partners = Literal["random", "matched_pca", "matched_cycle"]
"""How control partners are drawn: any control cell of the context, or one of the nearest."""

N_NEAREST = 10
"""A matched partner is drawn among so many nearest control cells, so that one odd cell is not everybody's partner."""
N_COMPONENTS = 10
"""Leading principal components that cells are matched on."""
LEAST_CYCLE_GENES = 5
"""Genes of each phase that must be among the features."""

# Tirosh et al. 2016 (Science 352:189), the lists that Seurat and scanpy users score the cycle by.
S_GENES = (
    "MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 MLF1IP HELLS RFC2 RPA2 NASP RAD51AP1 GMNN "
    "WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 CLSPN POLA1 "
    "CHAF1B BRIP1 E2F8"
)
G2M_GENES = (
    "HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF TACC3 FAM64A SMC4 CCNB2 CKAP2L "
    "CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 HN1 CDC20 TTK CDC25C KIF2C RANGAP1 NCAPD2 DLGAP5 "
    "CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 G2E3 GAS2L3 CBX5 CENPA"
)


def cycle_scores(X: sparse.csr_matrix, genes: Sequence[str]) -> np.ndarray:
    """S and G2/M score of each cell (n_cells, 2): mean expression of the phase's genes less the mean of all genes.

    Genes are matched by symbol, whatever the case.

    Raises
    ------
    MethodError
        If fewer than `LEAST_CYCLE_GENES` genes of a phase are among `genes`.
    """
    place = {gene.upper(): i for i, gene in enumerate(genes)}
    everything = np.asarray(X.mean(axis=1), dtype=np.float64).ravel()
    scores = []
    for phase, markers in (("S", S_GENES), ("G2/M", G2M_GENES)):
        columns = [place[gene] for gene in markers.split() if gene in place]
        if len(columns) < LEAST_CYCLE_GENES:
            raise MethodError(
                f"partners: matched_cycle needs {LEAST_CYCLE_GENES} {phase} genes among the features and finds "
                f"{len(columns)}; use matched_pca, or add the genes to the features"
            )
        scores.append(np.asarray(X[:, columns].mean(axis=1), dtype=np.float64).ravel() - everything)
    return np.column_stack(scores)


def background_coordinates(data: TrainingData, on: Partners) -> np.ndarray:
    """Coordinates in which cells are matched (n_cells, n_coordinates).

    Depth (logarithm of the library, or of the number of expressed genes where no library is known), and either the
    leading principal components or the two cycle scores. Each is centred within condition and context, since what a
    condition moves is no background, and scaled: depth and cycle scores to unit spread, components by the spread of the
    first.
    """
    depth = np.diff(data.X.indptr) if data.library is None else np.asarray(data.library)
    depth = np.log(np.maximum(depth, 1.0))[:, None]
    if on == "matched_cycle":
        other = cycle_scores(data.X, data.genes)
    else:
        loadings = data.loadings[:, :N_COMPONENTS]
        other = np.asarray(data.X @ loadings, dtype=np.float64) - data.centre @ loadings
    depth, other = (_centre_within(data, values) for values in (depth, other))
    spread = other.std(axis=0) if on == "matched_cycle" else other.std(axis=0).max(initial=0.0)
    tiny = np.finfo(np.float64).tiny
    return np.column_stack([depth / max(depth.std(), tiny), other / np.maximum(spread, tiny)])


def _centre_within(data: TrainingData, values: np.ndarray) -> np.ndarray:
    pairs = np.char.add(np.char.add(np.asarray(data.perturbation, str), "\t"), np.asarray(data.context, str))
    _, group = np.unique(pairs, return_inverse=True)
    totals = np.column_stack([np.bincount(group, weights=column) for column in values.T])
    return values - (totals / np.bincount(group)[:, None])[group]


def nearest_controls(coordinates: np.ndarray, rows: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """The `N_NEAREST` rows of `pool` nearest to each of `rows`, a cell itself left out (n_rows, n_nearest).

    A pool that holds fewer gives as many as it has; a cell whose pool is itself alone keeps itself.
    """
    from scipy.spatial import cKDTree

    n_wanted = min(N_NEAREST + 1, len(pool))
    place = cKDTree(coordinates[pool]).query(coordinates[rows], k=list(range(1, n_wanted + 1)))[1]
    found = pool[place]
    if n_wanted == 1:
        return found
    itself = found == rows[:, None]
    itself[~itself.any(1), -1] = True  # no control of this pool: the farthest is dropped instead
    return found[~itself].reshape(len(rows), n_wanted - 1)
