"""Simulated islets, a SCVI model trained on them, and one scored case, shared by all tests of this folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import anndata
import pytest
from scored_case import BETA, make_case

from perturbed.axis.run import score_axis
from perturbed.data.census.cells import add_batch
from perturbed.data.census.simulate import simulate_islets
from perturbed.data.census.spec import IsletParams


class World(NamedTuple):
    """Files of simulated cells and of a model of them."""

    cells: Path
    model: Path
    truth: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    import scvi

    folder = tmp_path_factory.mktemp("islets")
    islets = simulate_islets(IsletParams(n_cells=2400, n_genes=400), seed=0)
    obs = add_batch(islets.obs, "simulation")
    obs.index = [f"cell{i}" for i in range(len(obs))]
    cells = anndata.AnnData(islets.counts, obs=obs, var=islets.var.set_index("feature_id"))
    cells = cells[cells.obs["is_primary_data"].to_numpy(bool)].copy()
    cells.write_h5ad(folder / "cells.h5ad")
    islets.truth.to_csv(folder / "truth.csv", index=False)
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, n_hidden=48, n_latent=8, encode_covariates=False)
        model.train(
            40, accelerator="cpu", batch_size=128, enable_progress_bar=False, logger=False, plan_kwargs={"lr": 4e-3}
        )
        model.save(folder / "model", overwrite=True)
    return World(folder / "cells.h5ad", folder / "model", folder / "truth.csv")


@pytest.fixture(scope="session")
def tables(world, tmp_path_factory) -> Path:
    """Tables of a case with flows, scored for all cells and for β cells."""
    folder = tmp_path_factory.mktemp("scored") / "tables"
    flows = [
        {"gene": "Ins1", "cells": (BETA,), "name": "Ins1_beta", "on_map": True},
        {"gene": "Ins1", "sign": -1, "cells": (BETA,), "name": "Ins1_down"},
    ]
    case = make_case(judged=(BETA,), flows=flows, list_groups=("all", BETA), n_permutations=999)
    score_axis(case, world.cells, world.model, folder, truth=world.truth)
    return folder
