"""The class `PerturbedVAE`, which predicts real cells, on planted latents: its defaults, its partners, its posterior.

The study's own estimator (`latent_network`) is the same model with what the theory asks for; this is what one gets
without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from perturbed.interpret.latent_simulation import LatentCells
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.partners import N_COMPONENTS, Partners
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams
from perturbed.names import CONTROL

ClassArm = Literal["aligned", "matched", "unaligned"]
"""Partners drawn among all control cells, as the paper does; among the nearest ones; or no alignment."""

ARMS: dict[ClassArm, tuple[Partners, float]] = {
    "aligned": ("random", PerturbedVAEParams().alpha),
    "matched": ("matched_pca", PerturbedVAEParams().alpha),
    "unaligned": ("random", 0.0),
}


@dataclass(frozen=True)
class FittedClass:
    """A fitted `PerturbedVAE`."""

    method: PerturbedVAE

    def encode(self, x: np.ndarray, environment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means of z_ν, which sees the environment, and of z_ι."""
        cells = sparse.csr_matrix(x.astype(np.float32))
        z_nu = self.method.encode_response(cells, _name(environment))
        return z_nu.astype(np.float64), self.method.encode_background(cells).astype(np.float64)


def _name(environment: np.ndarray) -> np.ndarray:
    return np.array([f"E{e}" if e else CONTROL for e in environment])


def fit_class(
    cells: LatentCells, sizes: tuple[int, int], *, seed: int, device: str
) -> Iterator[tuple[str, FittedClass]]:
    """Fit `PerturbedVAE` in each of its arms, with the defaults of its class, which are the paper's.

    Parameters
    ----------
    cells
        Training cells. Their partners train too, as control cells; whose partner each is stays untold.
    sizes
        Responsive and invariant latents.
    seed, device
        Of weights, order and draws; where to train.
    """
    x = np.vstack([cells.x, cells.x_control]).astype(np.float32)
    names = np.concatenate([_name(cells.environment), np.full(len(cells.x), CONTROL)])
    centre = x.mean(0, dtype=np.float64)
    data = TrainingData(
        X=sparse.csr_matrix(x),
        perturbation=names,
        context=np.full(len(names), "all"),
        is_val=np.zeros(len(names), dtype=bool),
        genes=tuple(f"x{i}" for i in range(x.shape[1])),
        centre=centre,
        loadings=np.linalg.svd(x - centre, full_matrices=False)[2][:N_COMPONENTS].T,
    )
    for arm, (partners, alpha) in ARMS.items():
        params = PerturbedVAEParams(n_nu=sizes[0], n_iota=sizes[1], partners=partners, alpha=alpha, n_control=1)
        method = PerturbedVAE(params)
        method.fit(data, FitRun(seed=seed, device=device, progress=False))
        yield arm, FittedClass(method)
