"""Simulate Perturb-seq with planted truth: the embedded default data.

Two generators: `scm` lies inside PerturbedVAE's model class, `epistasis` outside of it. See `docs/simulation.md`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

import perturbed
from perturbed.config import parse
from perturbed.data.cards import SimulationSource
from perturbed.data.contracts import write_h5ad
from perturbed.data.simulators.epistasis import Epistasis
from perturbed.data.simulators.params import EpistasisParams, ScmParams
from perturbed.data.simulators.scm import Scm
from perturbed.data.simulators.world import (
    CELLS,
    TARGET_SUM,
    TRUTH,
    TRUTH_COUNTS,
    Background,
    Generator,
    World,
    describe,
    draw_counts,
    draw_overdispersion,
    expected_counts,
    log_normalise,
    stream,
)
from perturbed.errors import ConfigError
from perturbed.files import write_text

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 500  # cells simulated at once; part of the result, since each block of the truth has its own stream

_PARAMS: dict[str, type[ScmParams] | type[EpistasisParams]] = {"scm": ScmParams, "epistasis": EpistasisParams}


def simulate(source: SimulationSource, name: str) -> tuple[AnnData, AnnData]:
    """Simulate the cells of a card and their planted truth.

    Parameters
    ----------
    source
        The card's source: generator, parameters and seed.
    name
        Name of the dataset, for messages and provenance.

    Returns
    -------
    raw
        Cells × genes, counts in `X` (CSR float32); `obs`: `perturbation`, `n_perturbed`, `batch`, `cell_state`,
        `phase`, `depth`; `obsm`: `z_iota`, `z_nu`; `var`: `gene_id`, `program`.
    truth
        Conditions × genes, the expected log-normalised expression in `X`; `layers`: `variance`, `rate`, `log_rate`;
        the planted graph, effects, loadings and latents in `obs`, `obsm`, `varm` and `uns`.

    Raises
    ------
    ConfigError
        If a parameter is wrong; the message names the dataset and the key.
    """
    generator = build_generator(source, name)
    provenance = _provenance(source, generator.world, name)
    raw, truth = _simulate_cells(generator), _simulate_truth(generator)
    for adata in (raw, truth):
        adata.uns["provenance"] = provenance
        adata.uns["program_names"] = json.dumps(describe(generator.world), sort_keys=True)
    return raw, truth


def write_simulation(
    source: SimulationSource,
    name: str,
    raw_path: str | Path,
    truth_path: str | Path,
    gene_sets_path: str | Path | None = None,
) -> None:
    """Simulate the cells of a card and write `raw.h5ad`, `truth.h5ad` and, where asked for, the planted gene sets."""
    raw, truth = simulate(source, name)
    if gene_sets_path is not None:
        sets = json.loads(truth.uns["gene_sets"])
        lines = ["\t".join([program, "planted", *genes]) for program, genes in sorted(sets.items())]
        write_text(gene_sets_path, "\n".join(lines) + "\n")
    write_h5ad(truth_path, truth)
    write_h5ad(raw_path, raw)


def build_generator(source: SimulationSource, name: str) -> Generator:
    """The generator of a card, with its planted parameters drawn and no cell simulated yet.

    Raises
    ------
    ConfigError
        If a parameter is wrong; the message names the dataset and the key.
    """
    if source.seed < 0:
        raise ConfigError(f"dataset {name}: source.seed: must be 0 or more, is {source.seed}")
    params = parse(_PARAMS[source.generator], source.params, f"dataset {name}: source.params")
    if isinstance(params, ScmParams):
        return Scm(params, source.seed)
    return Epistasis(params, source.seed)


def _provenance(source: SimulationSource, world: World, name: str) -> str:
    """JSON of everything the draw depends on; no date, so that the same card gives the same bytes."""
    content = {
        "dataset": name,
        "generator": source.generator,
        "kind": "simulation",
        "params": world.params.model_dump(mode="json"),
        "seed": source.seed,
        "versions": {"numpy": np.__version__, "perturbed": perturbed.__version__},
    }
    return json.dumps(content, sort_keys=True)


def _gene_table(world: World) -> pd.DataFrame:
    """`gene_id` and the responsive program of largest loading, `none` outside of all gene sets."""
    names = np.array(describe(world)["z_nu"])
    best = np.abs(world.loadings_nu).argmax(axis=1)
    program = np.where(world.gene_sets.any(axis=1), names[best], "none")
    return pd.DataFrame({"gene_id": world.gene_ids, "program": program}, index=pd.Index(world.genes, dtype=str))


# --- the cells ----------------------------------------------------------------------------------------------------


def _simulate_cells(generator: Generator) -> AnnData:
    from anndata import AnnData

    world, params = generator.world, generator.world.params
    matrices, tables, z_iota, z_nu = [], [], [], []
    for name, key in world.conditions.items():
        rng = stream(world.seed, CELLS, *(i + 1 for i in key))
        n_cells = params.n_cells_per_perturbation if key else params.n_control
        for start in range(0, n_cells, BLOCK):
            cells = world.draw_background(rng, min(BLOCK, n_cells - start))
            response = generator.respond(key, cells)
            rate = expected_counts(response.log_rate, cells.depth)
            factor = draw_overdispersion(world.dispersion, cells.n_cells, rng)
            counts = draw_counts(rate, factor, generator.dropout(key, rate), rng)
            matrices.append(sparse.csr_matrix(counts))
            tables.append(_cell_table(name, len(key), cells))
            z_iota.append(cells.z_iota)
            z_nu.append(response.z_nu)
    obs = pd.concat(tables, ignore_index=True)
    obs.index = pd.Index([f"cell{i + 1:07d}" for i in range(len(obs))], dtype=str)
    raw = AnnData(sparse.csr_matrix(sparse.vstack(matrices, format="csr")), obs=obs, var=_gene_table(world))
    raw.obsm["z_iota"] = np.vstack(z_iota).astype(np.float32)
    raw.obsm["z_nu"] = np.vstack(z_nu).astype(np.float32)
    return raw


def _cell_table(name: str, n_perturbed: int, cells: Background) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "perturbation": name,
            "n_perturbed": n_perturbed,
            "batch": [f"batch{i + 1}" for i in cells.batch],
            "cell_state": [f"state{i + 1}" for i in cells.state],
            "phase": cells.phase,
            "depth": cells.depth,
        }
    )


# --- the truth ----------------------------------------------------------------------------------------------------


class _Moments:
    """Mean and variance per row and column, merged block by block (Chan et al. 1983)."""

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.n = np.zeros(n_rows, dtype=int)
        self.mean = np.zeros((n_rows, n_columns))
        self.square = np.zeros((n_rows, n_columns))

    def add(self, row: int, values: np.ndarray) -> None:
        n_new = len(values)
        total = self.n[row] + n_new
        mean = values.mean(axis=0, dtype=np.float64)
        gap = mean - self.mean[row]
        self.square[row] += ((values - mean) ** 2).sum(axis=0) + gap**2 * (self.n[row] * n_new / total)
        self.mean[row] += gap * (n_new / total)
        self.n[row] = total

    @property
    def variance(self) -> np.ndarray:
        return self.square / (self.n[:, None] - 1)


def _simulate_truth(generator: Generator) -> AnnData:
    """Average fresh cells, never those of `raw`.

    Every condition sees the same backgrounds, noise and overdispersion, so that cell states and depths differ between
    conditions by nothing but the perturbation; the streams depend on nothing but the seed and the block.
    """
    world, params = generator.world, generator.world.params
    shape = (len(world.conditions), params.n_genes)
    expression, rates, log_rates = _Moments(*shape), _Moments(*shape), _Moments(*shape)
    z_nu = _Moments(len(world.conditions), params.d_nu)
    z_iota = _Moments(1, params.d_iota)
    for block, start in enumerate(range(0, params.n_truth_cells, BLOCK)):
        n_cells = min(BLOCK, params.n_truth_cells - start)
        rng = stream(world.seed, TRUTH, block)
        cells = world.draw_background(rng, n_cells)
        factor = draw_overdispersion(world.dispersion, n_cells, rng)
        z_iota.add(0, cells.z_iota)
        for row, key in enumerate(world.conditions.values()):
            response = generator.respond(key, cells)
            rate = expected_counts(response.log_rate, cells.depth)
            rng = stream(world.seed, TRUTH_COUNTS, block)
            counts = draw_counts(rate, factor, generator.dropout(key, rate), rng)
            expression.add(row, log_normalise(counts))
            rates.add(row, np.log1p(rate * (TARGET_SUM / cells.depth[:, None])))
            log_rates.add(row, response.log_rate)
            z_nu.add(row, response.z_nu)
    truth = _truth_table(generator, expression)
    truth.layers["variance"] = expression.variance.astype(np.float32)
    truth.layers["rate"] = rates.mean.astype(np.float32)
    truth.layers["log_rate"] = log_rates.mean.astype(np.float32)
    truth.obsm["z_nu"] = z_nu.mean
    truth.obsm["z_iota"] = np.repeat(z_iota.mean, len(truth), axis=0)
    return truth


def _truth_table(generator: Generator, expression: _Moments) -> AnnData:
    from anndata import AnnData

    world = generator.world
    names = list(world.conditions)
    obs = pd.DataFrame(
        {
            "perturbation": names,
            "context": "all",
            "n_perturbed": [len(key) for key in world.conditions.values()],
            "n_cells": expression.n,
            **generator.planted_labels(),
        },
        index=pd.Index(names, dtype=str),
    )
    var = _gene_table(world).assign(bias=world.bias, dispersion=world.dispersion)
    truth = AnnData(expression.mean.astype(np.float32), obs=obs, var=var)
    _plant(truth, generator)
    return truth


def _plant(truth: AnnData, generator: Generator) -> None:
    """Save what was planted: by condition in `obsm`, by gene in `varm`, the rest in `uns`."""
    world = generator.world
    for key, values in generator.planted_rows().items():
        truth.obsm[key] = values
    for key in ("loadings_iota", "loadings_nu", "gene_sets", "mlp_out"):
        truth.varm[key] = getattr(world, key)
    truth.varm["batch_shift"] = world.batch_shift.T
    names = describe(world)["z_nu"]
    genes = np.array(world.genes)
    sets = {name: genes[world.gene_sets[:, k]].tolist() for k, name in enumerate(names)}
    planted: dict[str, Any] = {key: getattr(world, key) for key in ("mlp_in", "mlp_bias", "state_centres")}
    truth.uns["planted"] = {**planted, "state_weights": world.state_weights, "mean_z_iota": world.mean_z_iota}
    truth.uns["gene_sets"] = json.dumps(sets, sort_keys=True)
