"""Every perturbation of a screen against the decoder's gradient of its own genes.

For perturbation p with genes G the flow is the mean gradient of G's decoded expression over control cells, and the
observed shift is the mean latent of p's cells minus that of controls. Nothing in the decoder's training need know p. As
the encoder reads the perturbed genes too, and over-expression alone would move cells along their gradient, the shift is
also taken with these genes set to the controls' mean in p's cells (`without own genes`).

On simulated data the planted effect of p on expression is known too. As a linear readout of the decoder it has a
gradient, which must lead where p's cells are if gradients are to be believed at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbed.data.contracts import read_h5ad
from perturbed.errors import DataError
from perturbed.files import atomic
from perturbed.gradients.agreement import cosine, match_genes, mean_gradients
from perturbed.gradients.cases import fresh_decoder
from perturbed.gradients.cells import LatentCells, column_of, decoder_of, encode_cells, select
from perturbed.gradients.expression import read_genes, reconstruction_errors
from perturbed.gradients.spec import GradientCase
from perturbed.models.base import Method, load_model
from perturbed.models.nb_vae import NBVAE
from perturbed.names import CONTROL, genes_of

SHIFTS = ("all genes", "without own genes")
"""How the observed shift is taken."""
MEASURES = ("cosine", "cosine_alike", "percentile_among_alike", "percentile_among_targets")
"""Numbers of each perturbation that are averaged."""


class _Flow(NamedTuple):
    """A direction for each perturbation, and random ones to rank it among."""

    own: np.ndarray
    """(n_perturbations, n_latent)."""
    random: np.ndarray
    """(n_perturbations, n_random, n_latent)."""


class _Screen(NamedTuple):
    cells: LatentCells
    names: list[str]
    flows: dict[str, _Flow]
    """The decoder's gradient, a plain rival and a null; on simulated data the planted effect too."""
    shifts: dict[str, np.ndarray]
    """By way of taking it: observed shift of every perturbation (n_perturbations, n_latent)."""


def run_screen(
    spec: GradientCase,
    model: Path,
    prepared: Path,
    split: Path,
    features: Path,
    out: Path,
    *,
    seed: int = 0,
    truth: Path | None = None,
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
        `percentile_among_alike`, the share of random genes alike in mean and variance whose flow agrees less (of a
        planted effect: of its permutations over genes); `percentile_among_targets`, the share of the other
        perturbations' flows that do. `agreement.csv`: their means over single and over combined perturbations with
        bootstrap intervals; without knowledge they are 0, 0.5 and 0.5. `quality.csv`: errors of an nb_vae.
    seed
        Of the bootstrap, of random genes and of the untrained decoder.
    truth
        `truth.h5ad` of a simulation.

    Raises
    ------
    DataError
        If no perturbation has all its genes among the decoder's outputs.
    """
    method = load_model(model)
    screen = _prepare(spec, method, prepared, split, features, truth, seed)
    table = pd.DataFrame(_rows(screen))
    tables = {"screen": table, "agreement": pd.DataFrame(_means(table, spec.n_bootstrap, seed))}
    if isinstance(method, NBVAE):
        tables["quality"] = pd.DataFrame(reconstruction_errors(method, prepared, screen.cells))
    with atomic(out) as part:
        part.mkdir()
        for name, each in tables.items():
            each.to_csv(part / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")


def _prepare(
    spec: GradientCase,
    method: Method,
    prepared: Path,
    split: Path,
    features: Path,
    truth: Path | None,
    seed: int,
) -> _Screen:
    decoder = decoder_of(method)
    cells = encode_cells(decoder, prepared, split, features)
    label = column_of(cells.obs, "perturbation")
    start = select(cells.obs, spec.unperturbed)
    names = _perturbations(label[~start], set(decoder.genes), spec.min_cells)
    genes = [decoder.find(genes_of(name)) for name in names]
    targets = np.unique(np.concatenate(genes))
    alike = dict(zip(targets, match_genes(cells.mean, cells.variance, targets, spec.n_random_genes, seed=seed)))

    def of_genes(directions: np.ndarray) -> _Flow:
        own = np.array([directions[columns].mean(axis=0) for columns in genes])
        return _Flow(own, np.array([np.mean([directions[alike[c]] for c in columns], axis=0) for columns in genes]))

    by_decoder = {"": _gradients(decoder, cells, start)}
    if spec.untrained:
        by_decoder[", untrained decoder"] = _gradients(fresh_decoder(method, seed), cells, start)
    flows = {f"gradient{which}": of_genes(directions) for which, directions in by_decoder.items()}
    flows["covariance"] = of_genes(_covariances(decoder.genes, cells, prepared, start))
    if truth is not None:
        effects = _planted_effects(truth, names, decoder.genes)
        rng = np.random.default_rng(seed)
        permuted = np.array([[rng.permutation(row) for _ in range(spec.n_random_genes)] for row in effects])
        for which, directions in by_decoder.items():
            flows[f"planted effect{which}"] = _Flow(effects @ directions, permuted @ directions)
    centre = cells.z[start].mean(axis=0)
    shifts = {SHIFTS[0]: np.array([cells.z[label == name].mean(axis=0) - centre for name in names])}
    own = _means_without_own(decoder, cells, prepared, names, label, start)
    shifts[SHIFTS[1]] = own - centre
    return _Screen(cells, names, flows, shifts)


def _perturbations(labels: np.ndarray, genes: set[str], min_cells: int) -> list[str]:
    counts = pd.Series(labels).value_counts()
    enough = [str(name) for name, n in counts.items() if n >= min_cells and name != CONTROL]
    names = sorted(name for name in enough if set(genes_of(name)) <= genes)
    if not names:
        raise DataError(
            f"none of {len(enough)} perturbations with {min_cells} cells has its genes among the decoder's "
            f"{len(genes)}; set features.keep_perturbed or lower min_cells"
        )
    return names


def _planted_effects(truth: Path, names: list[str], genes: tuple[str, ...]) -> np.ndarray:
    """Noise-free effects on log-normalised expression (n_perturbations, n_genes)."""
    planted = read_h5ad(truth)
    columns = planted.var_names.get_indexer(list(genes))
    rows = planted.obs_names.get_indexer([CONTROL, *names])
    if (columns < 0).any() or (rows < 0).any():
        raise DataError(f"{truth}: the truth of other genes or perturbations; use that of the same simulation")
    expected = np.asarray(planted.X, dtype=float)[rows][:, columns]
    return expected[1:] - expected[0]


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


def _rows(screen: _Screen) -> Iterator[dict[str, Any]]:
    """One row for each flow, way to take the shift and perturbation."""
    parts = screen.cells.obs["part"].to_numpy()
    label = column_of(screen.cells.obs, "perturbation")
    for flow, directions in screen.flows.items():
        for shift, observed in screen.shifts.items():
            agree = cosine(observed[:, None], directions.own[None])  # shifts in rows, flows of targets in columns
            for i, name in enumerate(screen.names):
                random = cosine(directions.random[i], observed[i])
                others = np.delete(agree[i], i)
                mine = label == name
                yield {
                    "perturbation": name, "n_genes": len(genes_of(name)), "flow": flow, "shift": shift,
                    "part": "train" if (mine & (parts == "train")).any() else "held out", "n_cells": int(mine.sum()),
                    "effect_size": float(np.linalg.norm(observed[i])), "cosine": agree[i, i],
                    "cosine_alike": float(np.nanmean(random)),
                    "percentile_among_alike": float((random < agree[i, i]).mean()),
                    "percentile_among_targets": float((others < agree[i, i]).mean()) if len(others) else np.nan,
                }  # fmt: skip


def _means(table: pd.DataFrame, n_bootstrap: int, seed: int) -> Iterator[dict[str, Any]]:
    """Means over perturbations, with percentile intervals of a bootstrap over them."""
    group = np.where(table["n_genes"] == 1, "singles", "combinations")
    for (name, flow, shift), rows in table.groupby([group, "flow", "shift"], sort=False):
        draws = np.random.default_rng(seed).integers(len(rows), size=(n_bootstrap, len(rows)))  # so that flows compare
        for measure in MEASURES:
            values = rows[measure].to_numpy()
            low, high = np.nanquantile(np.nanmean(values[draws], axis=1), [0.025, 0.975])
            yield {
                "group": name, "flow": flow, "shift": shift, "measure": measure, "mean": np.nanmean(values),
                "low": low, "high": high, "n_units": len(rows), "unit": "perturbation",
            }  # fmt: skip
