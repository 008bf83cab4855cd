"""Small simulated screens that the simulators' tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from perturbed.data.cards import SimulationSource
from perturbed.data.simulate import simulate

SMALL = {
    "n_genes": 60,
    "n_perturbed_genes": 6,
    "n_doubles": 6,
    "n_cells_per_perturbation": 20,
    "n_control": 50,
    "n_truth_cells": 600,
    "d_nu": 5,
    "gene_set_size": 12,
    "hidden": 8,
    "depth": 1000.0,
}
GENERATORS = ("scm", "epistasis")


def source(generator: str, seed: int = 0, **params: Any) -> SimulationSource:
    extra = {"idiosyncratic_genes": 5} if generator == "epistasis" else {}
    return SimulationSource(kind="simulation", generator=generator, seed=seed, params={**SMALL, **extra, **params})  # type: ignore[arg-type]


@cache
def simulated(generator: str) -> tuple[Any, Any]:
    return simulate(source(generator), "small")


@cache
def well_sampled(generator: str) -> tuple[Any, Any]:
    """Many cells of few perturbations, to compare means."""
    sizes = {"n_perturbed_genes": 3, "n_doubles": 2, "n_cells_per_perturbation": 3000, "n_truth_cells": 5000}
    return simulate(source(generator, seed=3, **sizes), "sampled")


def log_normalised(raw: Any) -> np.ndarray:
    counts = raw.X.toarray().astype(float)
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
