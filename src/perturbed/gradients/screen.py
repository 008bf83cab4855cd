"""Every perturbation of a screen against the decoder's gradient of its own genes.

For perturbation p with genes G the flow is the mean gradient of G's decoded expression over control cells, and the
observed shift is the mean latent of p's cells minus that of controls. Nothing in the decoder's training need know p. As
the encoder reads the perturbed genes too, and over-expression alone would move cells along their gradient, the shift is
also taken with these genes set to the controls' mean in p's cells (`without own genes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbed.errors import DataError
from perturbed.files import atomic
from perturbed.gradients.agreement import cosine, match_genes, mean_gradients
from perturbed.gradients.cases import fresh_decoder
from perturbed.gradients.cells import LatentCells, column_of, decoder_of, encode_cells, select
from perturbed.gradients.expression import read_genes
from perturbed.gradients.spec import GradientCase
from perturbed.models.base import Method, load_model
from perturbed.names import CONTROL, genes_of

SHIFTS = ("all genes", "without own genes")
"""How the observed shift is taken."""
FLOWS = ("gradient", "covariance", "untrained decoder")
"""What is compared with it: the decoder's gradient, a plain rival and a null."""


class _Screen(NamedTuple):
    spec: GradientCase
    decoder: Any
    cells: LatentCells
    start: np.ndarray
    names: list[str]
    flows: dict[str, np.ndarray]
    """By flow: direction of every gene (n_genes, n_latent)."""
    shifts: dict[str, np.ndarray]
    """By way of taking it: observed shift of every perturbation (n_perturbations, n_latent)."""


def run_screen(
    spec: GradientCase, model: Path, prepared: Path, split: Path, features: Path, out: Path, *, seed: int = 0
) -> None:
    """Compare the flow of every perturbation with its observed shift, and write tables to the folder `out`.

    Parameters
    ----------
    spec
        The case; its `unperturbed` cells are those that flows start from and shifts are taken against.
    model, prepared, split, features
        The fitted decoder and the cells.
    out
        Folder to write. `screen.csv`, one row for each perturbation, flow and way to take the shift: `cosine`;
        `percentile_among_alike`, the share of random genes alike in mean and variance whose flow agrees less;
        `percentile_among_targets`, the share of the other perturbations' flows that do. `agreement.csv`: their means
        over perturbations with bootstrap intervals; without knowledge they are 0, 0.5 and 0.5.
    seed
        Of the bootstrap, of random genes and of the untrained decoder.

    Raises
    ------
    DataError
        If no perturbation has all its genes among the decoder's outputs.
    """
    method = load_model(model)
    screen = _prepare(spec, method, prepared, split, features, seed)
    table = pd.DataFrame(_rows(screen, seed))
    tables = {"screen": table, "agreement": pd.DataFrame(_means(table, spec.n_bootstrap, seed))}
    with atomic(out) as part:
        part.mkdir()
        for name, each in tables.items():
            each.to_csv(part / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")


def _prepare(spec: GradientCase, method: Method, prepared: Path, split: Path, features: Path, seed: int) -> _Screen:
    decoder = decoder_of(method)
    cells = encode_cells(decoder, prepared, split, features)
    label = column_of(cells.obs, "perturbation")
    start = select(cells.obs, spec.unperturbed)
    known = set(decoder.genes)
    counts = pd.Series(label[~start]).value_counts()
    enough = [str(name) for name, n in counts.items() if n >= spec.min_cells and name != CONTROL]
    names = sorted(name for name in enough if set(genes_of(name)) <= known)
    if not names:
        raise DataError(
            f"none of {len(enough)} perturbations with {spec.min_cells} cells has its genes among the decoder's "
            f"{len(known)}; set features.keep_perturbed or lower min_cells"
        )
    flows = {"gradient": _gradients(decoder, cells, start)}
    flows["covariance"] = _covariances(decoder.genes, cells, prepared, start)
    if spec.untrained:
        flows["untrained decoder"] = _gradients(fresh_decoder(method, seed), cells, start)
    centre = cells.z[start].mean(axis=0)
    shifts = {"all genes": np.array([cells.z[label == name].mean(axis=0) - centre for name in names])}
    own = _means_without_own(decoder, cells, prepared, names, label, start)
    shifts["without own genes"] = own - centre
    return _Screen(spec, decoder, cells, start, names, flows, shifts)


def _gradients(decoder: Any, cells: LatentCells, start: np.ndarray) -> np.ndarray:
    rows = torch.from_numpy(np.flatnonzero(start))
    context = {key: value[rows] for key, value in cells.encoded.context.items()}
    return mean_gradients(decoder, cells.encoded.mean[rows], context, np.zeros(len(rows), dtype=int), 1)[0]


def _covariances(genes: tuple[str, ...], cells: LatentCells, prepared: Path, start: np.ndarray) -> np.ndarray:
    """Covariance of every gene with every latent over the cells that trained: what varies with the gene, no decoder."""
    rows = np.flatnonzero((cells.obs["part"] == "train").to_numpy() | start)
    centred = cells.z[rows].astype(float) - cells.z[rows].mean(axis=0)
    total = np.zeros((len(genes), centred.shape[1]))
    for place, X in read_genes(prepared, genes, rows):
        total += X.T.astype(np.float64) @ centred[place]
    return total / len(rows)


def _means_without_own(
    decoder: Any, cells: LatentCells, prepared: Path, names: list[str], label: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Mean latent of each perturbation's cells, its own genes set to the mean of unperturbed cells."""
    size = len(decoder.genes)
    total = sum(
        np.asarray(X.sum(axis=0)).ravel() for _, X in read_genes(prepared, decoder.genes, np.flatnonzero(start))
    )
    normal = np.asarray(total).reshape(size) / start.sum()
    means = []
    for name in names:
        own = decoder.find(genes_of(name))
        parts = []
        for _, X in read_genes(prepared, decoder.genes, np.flatnonzero(label == name)):
            dense = X.toarray()
            dense[:, own] = normal[own]
            parts.append(decoder.encode(sparse.csr_matrix(dense)).mean.numpy())
        means.append(np.concatenate(parts).mean(axis=0))
    return np.array(means)


def _rows(screen: _Screen, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each flow, way to take the shift and perturbation."""
    parts = screen.cells.obs["part"].to_numpy()
    label = column_of(screen.cells.obs, "perturbation")
    genes = [screen.decoder.find(genes_of(name)) for name in screen.names]
    targets = np.unique(np.concatenate(genes))
    alike = dict(
        zip(
            targets,
            match_genes(screen.cells.mean, screen.cells.variance, targets, screen.spec.n_random_genes, seed=seed),
        )
    )
    for flow, directions in screen.flows.items():
        own = np.array([directions[columns].mean(axis=0) for columns in genes])
        for shift, observed in screen.shifts.items():
            agree = cosine(observed[:, None], own[None])  # shifts in rows, flows of targets in columns
            for i, name in enumerate(screen.names):
                random = np.mean([directions[alike[column]] for column in genes[i]], axis=0)
                others = np.delete(agree[i], i)
                mine = label == name
                yield {
                    "perturbation": name, "n_genes": len(genes[i]), "flow": flow, "shift": shift,
                    "part": "train" if (mine & (parts == "train")).any() else "held out", "n_cells": int(mine.sum()),
                    "effect_size": float(np.linalg.norm(observed[i])), "cosine": agree[i, i],
                    "cosine_alike": float(np.nanmean(cosine(random, observed[i]))),
                    "percentile_among_alike": float((cosine(random, observed[i]) < agree[i, i]).mean()),
                    "percentile_among_targets": float((others < agree[i, i]).mean()) if len(others) else np.nan,
                }  # fmt: skip


def _means(table: pd.DataFrame, n_bootstrap: int, seed: int) -> Iterator[dict[str, Any]]:
    """Means over perturbations, with percentile intervals of a bootstrap over them."""
    rng = np.random.default_rng(seed)
    size = table["perturbation"].nunique()
    draws = rng.integers(size, size=(n_bootstrap, size))  # the same for every row, so that rows compare
    for (flow, shift), rows in table.groupby(["flow", "shift"], sort=False):
        for measure in ("cosine", "cosine_alike", "percentile_among_alike", "percentile_among_targets"):
            values = rows[measure].to_numpy()
            low, high = np.nanquantile(np.nanmean(values[draws], axis=1), [0.025, 0.975])
            yield {
                "group": "all", "flow": flow, "shift": shift, "measure": measure, "mean": np.nanmean(values),
                "low": low, "high": high, "n_units": size, "unit": "perturbation",
            }  # fmt: skip
