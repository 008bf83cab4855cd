"""Short fits and small side files for tests that run over every method file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

QUICK_SPARSE = {"n_latent": 4, "n_hidden": 8, "epochs": 4, "n_samples": 5, "patience": 2, "lr": 3e-3}
QUICK_RESPONSE = {"n_nu": 4, "n_iota": 3, "n_hidden": 8, "epochs": 4, "n_samples": 5, "patience": 2, "lr": 3e-3}
QUICK_FLOW = {
    "hidden": (8, 6),
    "epochs": 4,
    "patience": 2,
    "min_epochs": 3,
    "batch_size": 64,
    "n_steps": 3,
    "n_control": 10,
}
QUICK: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sams_vae", "sams_vae_gaussian", "svae_plus", "svae_plus_gaussian"), QUICK_SPARSE),
    **dict.fromkeys(("perturbedvae", "perturbedvae_nb", "perturbedvae_mmd"), QUICK_RESPONSE),
    "discrepancy_vae": {"n_latent": 4, "n_hidden": 8, "epochs": 4, "n_samples": 5, "patience": 2},
    "sena": {"n_latent": 4, "n_hidden": 8, "epochs": 4, "n_samples": 5, "patience": 2},
    **dict.fromkeys(("nb_vae", "nb_vae_gaussian"), QUICK_FLOW),
    "random_forest": {"n_trees": 5},
    "scvi_additive": {"n_latent": 3, "n_hidden": 8, "epochs": 3, "n_samples": 5, "n_control": 5},
}
"""Overrides that make a fit quick and change nothing it promises."""


def write_side_files(folder: Path, genes: Sequence[str], cells: Sequence[str], X: sparse.csr_matrix) -> dict[str, Path]:
    """Every side file that a method of `config/methods` may require, with something in it."""
    sets = {"even": genes[0::2], "third": genes[0::3]}
    (folder / "sets.gmt").write_text("".join("\t".join([name, "", *members]) + "\n" for name, members in sets.items()))
    draw = np.random.default_rng(0).normal(size=(len(genes), 6))
    pd.DataFrame(draw, index=list(genes)).to_csv(folder / "gene_embedding.csv")
    pd.DataFrame(X @ draw, index=list(cells)).to_csv(folder / "cell_embedding.csv")
    return {
        "gene_sets": folder / "sets.gmt",
        "gene_embedding": folder / "gene_embedding.csv",
        "cell_embedding": folder / "cell_embedding.csv",
    }
