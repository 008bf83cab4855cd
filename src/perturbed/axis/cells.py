"""The cells of an axis case: their arm, donor, study, type and latents, and counts where there are any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.axis.compact import CompactDecoder
from perturbed.axis.spec import POOLED, AxisCase
from perturbed.data.census.filters import SEVERAL, values_of
from perturbed.data.census.model import check_batches, check_genes
from perturbed.data.matrices import read_rows
from perturbed.data.ondisk import MatrixOnDisk
from perturbed.decoders.scvi import SCVIDecoder
from perturbed.errors import DataError, suggest

CHUNK = 8192
"""Cells read at a time."""
ARMS = ("unperturbed", "perturbed")
BATCH = "batch"
"""Column of the batch the model was trained with."""


@dataclass(frozen=True)
class Counts:
    """Raw counts of the cells, on disk where they are CSR."""

    path: Path
    matrix: Any
    rows: np.ndarray
    """Rows of the matrix, one per cell, ascending (n_cells,)."""
    names: tuple[str, ...]
    """Names of its columns."""
    decoder: SCVIDecoder

    def chunks(self) -> Iterator[tuple[slice, sparse.csr_matrix, np.ndarray]]:
        """Cells in order: which, their counts on the model's genes (CSR), and their counts of all genes (n_chunk,)."""
        for start in range(0, len(self.rows), CHUNK):
            inside = slice(start, min(start + CHUNK, len(self.rows)))
            matrix = read_rows(self.matrix, self.rows[inside])
            try:
                counts = self.decoder.arrange(matrix, self.names)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from None
            yield inside, counts, np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


@dataclass(frozen=True)
class AxisCells:
    """The cells of both arms of a case."""

    path: Path
    names: np.ndarray
    """Names of the cells (n_cells,)."""
    z: np.ndarray
    """Posterior means, float32 (n_cells, n_latent)."""
    batch: np.ndarray
    """Batch of each cell (n_cells,)."""
    arm: np.ndarray
    """0 unperturbed, 1 perturbed (n_cells,)."""
    donor: np.ndarray
    """Row of `donors` (n_cells,)."""
    donors: pd.DataFrame
    """One row per donor: `donor`, `study`, `arm`."""
    kind: np.ndarray
    """Type of each cell (n_cells,); `all` everywhere where the case has no groups."""
    decoder: CompactDecoder
    """The model's decoder for the batches of these cells."""
    symbols: np.ndarray
    """Symbols of the decoder's genes, their ids where none is known (n_genes,)."""
    counts: Counts | None
    """None where the latents came without counts."""
    joined: np.ndarray
    """Cells with other values beside the one that made their arm, such as another disease (n_cells,)."""

    def group(self, name: str) -> np.ndarray:
        """Cells of a group by position, ascending."""
        return np.arange(len(self.kind)) if name == POOLED else np.flatnonzero(self.kind == name)

    def unfit(self, rows: np.ndarray, spec: AxisCase) -> str:
        """Why a group of cells cannot be answered for; empty where it can."""
        for k, arm in enumerate(ARMS):
            inside = rows[self.arm[rows] == k]
            n_donors = len(np.unique(self.donor[inside]))
            if len(inside) < spec.min_cells:
                return f"{len(inside)} {arm} cells, min_cells is {spec.min_cells}"
            if n_donors < spec.min_donors:
                return f"{n_donors} {arm} donors, min_donors is {spec.min_donors}"
        return ""


def read_cells(spec: AxisCase, path: str | Path, decoder: SCVIDecoder, symbols: Path | None = None) -> AxisCells:
    """Read the cells of a case and encode them, unless the file has their latents.

    Parameters
    ----------
    spec
        The case.
    path
        `cells.h5ad`: raw counts in X, `batch` and the case's columns in `obs`, optionally latents in
        `obsm["qz_mean"]`, which are then taken.
    decoder
        The model.
    symbols
        CSV with `gene_id` and `symbol`, where the cells' own table of genes has no `feature_name`.

    Raises
    ------
    DataError
        If a column, value or batch is missing, a donor is in both arms, there are too few cells or donors, or genes
        or latents are not the model's.
    """
    path = Path(path)
    file, obs, var = _open(path)
    arm = _arms(spec, obs, path)
    arm[~_kept(spec, obs, path)] = -1
    rows = np.flatnonzero(arm >= 0)
    arm = arm[rows]
    for k, name in enumerate(ARMS):
        if not (arm == k).any():
            raise DataError(f"{path}: `keep` leaves no {name} cell; loosen it, or choose other arms")
    donor, donors = _donors(spec, obs.iloc[rows], arm, path)
    batch = _batch(decoder, obs, path)[rows]
    if len(var):
        check_genes(decoder.genes, list(map(str, var.index)), str(path))
    check_batches(decoder, pd.Series(batch), str(path))  # before any work
    counts = _counts(file, path, rows, var, decoder)
    z = _latents(file, path, rows, decoder, counts, batch)
    kind = np.full(len(rows), POOLED, dtype=object) if spec.groups is None else _column(obs, spec.groups, path)[rows]
    few = CompactDecoder(decoder, list(dict.fromkeys(batch)))
    names = obs.index.to_numpy(dtype=object)[rows]
    joined = _joined(spec, obs.iloc[rows], arm)
    named = _symbols(decoder, var, symbols)
    return AxisCells(path, names, z, batch, arm, donor, donors, kind, few, named, counts, joined)


def _open(path: Path) -> tuple[h5py.File, pd.DataFrame, pd.DataFrame]:
    from anndata.io import read_elem

    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed census`, or correct the path")
    try:
        file = h5py.File(path, "r")
        return file, read_elem(file["obs"]), read_elem(file["var"])
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        raise DataError(f"{path}: not a readable h5ad ({' '.join(str(error).split())[:160]})") from None


def _column(obs: pd.DataFrame, name: str, path: Path) -> np.ndarray:
    if name not in obs:
        raise DataError(f"{path}: no obs column {name!r}; {suggest(name, map(str, obs.columns))}")
    return np.asarray(obs[name].astype(str), dtype=object)


def _arms(spec: AxisCase, obs: pd.DataFrame, path: Path) -> np.ndarray:
    """0 for unperturbed, 1 for perturbed, −1 for other cells (n_cells,)."""
    arm = np.full(len(obs), -1)
    for k, group in enumerate((spec.unperturbed, spec.perturbed)):
        values = _column(obs, group.column, path)
        for value in group.values:
            inside = _having(values, (value,))
            if not inside.any():
                raise DataError(f"{path}: no cell has {group.column} {value!r}; {suggest(value, set(values))}")
            if k and (arm[inside] == 0).any():
                raise DataError(f"{path}: cells of {group.column} {value!r} are in both arms; part the arms' values")
            arm[inside] = k
    return arm


def _joined(spec: AxisCase, obs: pd.DataFrame, arm: np.ndarray) -> np.ndarray:
    """Cells whose arm comes from one of several values (n_cells,)."""
    found = np.zeros(len(obs), dtype=bool)
    for k, group in enumerate((spec.unperturbed, spec.perturbed)):
        found |= (arm == k) & obs[group.column].astype(str).str.contains(SEVERAL, regex=False).to_numpy(dtype=bool)
    return found


def _kept(spec: AxisCase, obs: pd.DataFrame, path: Path) -> np.ndarray:
    inside = np.ones(len(obs), dtype=bool)
    for column, wanted in spec.keep.items():
        values = _column(obs, column, path)
        for value in wanted:
            if not _having(values, (value,)).any():
                raise DataError(f"{path}: keep: no cell has {column} {value!r}; {suggest(value, set(values))}")
        inside &= _having(values, wanted)
    return inside


def _having(values: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
    """Cells with one of some values, be it one of several that a cell has (n_cells,)."""
    known = [value for value in set(values) if not set(values_of(value)).isdisjoint(wanted)]
    return np.isin(values, known)


def _donors(spec: AxisCase, obs: pd.DataFrame, arm: np.ndarray, path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Donor of each cell, and the table of donors; ids count within their study only."""
    ids = _column(obs, spec.donors, path)
    study = _studies(spec, obs, path)
    table = pd.DataFrame({"donor": ids, "study": study, "arm": arm})
    donors = table.drop_duplicates().sort_values(["arm", "study", "donor"]).reset_index(drop=True)
    twice = donors[donors.duplicated(["donor", "study"])]
    if len(twice):
        raise DataError(
            f"{path}: {spec.donors} {twice['donor'].iloc[0]!r} has cells in both arms ({len(twice)} such); bootstrap "
            "and permutations need each in one: name a column of samples in `donors`, or leave one of its "
            "conditions out with `keep`"
        )
    place = {key: i for i, key in enumerate(zip(donors["donor"], donors["study"]))}
    return np.array([place[key] for key in zip(ids, study)]), donors


def _studies(spec: AxisCase, obs: pd.DataFrame, path: Path) -> np.ndarray:
    """Study of each cell (n_cells,); one for all where the case names none."""
    if spec.study is None:
        return np.full(len(obs), "", dtype=object)
    if isinstance(spec.study, str):
        return _column(obs, spec.study, path)
    names = _column(obs, spec.study.column, path)
    found = {}
    for name in sorted(set(names)):
        match = re.fullmatch(spec.study.pattern, name)
        if match is None:
            raise DataError(
                f"{path}: study: {spec.study.column} {name!r} is not of the form {spec.study.pattern!r}; correct the "
                "pattern"
            )
        found[name] = match["study"]
    return np.array([found[name] for name in names], dtype=object)


def _batch(decoder: SCVIDecoder, obs: pd.DataFrame, path: Path) -> np.ndarray:
    if BATCH in obs:
        return _column(obs, BATCH, path)
    if len(decoder.batches) == 1:
        return np.full(len(obs), decoder.batches[0], dtype=object)
    raise DataError(f"{path}: no obs column 'batch', the batches the model was trained with; make it with `census`")


def _counts(file: h5py.File, path: Path, rows: np.ndarray, var: pd.DataFrame, decoder: SCVIDecoder) -> Counts | None:
    from anndata.io import read_elem

    if not len(var) or "X" not in file:
        return None
    element = file["X"]
    on_disk = isinstance(element, h5py.Group) and element.attrs.get("encoding-type") == "csr_matrix"
    matrix = MatrixOnDisk(element) if on_disk else sparse.csr_matrix(read_elem(element))
    return Counts(path, matrix, rows, tuple(var.index.astype(str)), decoder)


def _latents(
    file: h5py.File, path: Path, rows: np.ndarray, decoder: SCVIDecoder, counts: Counts | None, batch: np.ndarray
) -> np.ndarray:
    if "obsm" in file and "qz_mean" in file["obsm"]:
        z = file["obsm"]["qz_mean"][:][rows].astype(np.float32)
        if z.ndim != 2 or z.shape[1] != decoder.n_latent:
            raise DataError(f"{path}: obsm['qz_mean'] has {z.shape[-1]} latents, the model {decoder.n_latent}")
        if not np.isfinite(z).all():
            raise DataError(f"{path}: obsm['qz_mean'] holds NaN or infinite values; take these cells out")
        return z
    if counts is None:
        raise DataError(f"{path}: has neither counts nor obsm['qz_mean']; fetch the cells with one of them")
    return np.concatenate(
        [decoder.encode(part, list(batch[inside])).mean.numpy() for inside, part, _ in counts.chunks()]
    )


def _symbols(decoder: SCVIDecoder, var: pd.DataFrame, path: Path | None) -> np.ndarray:
    known: dict[str, str] = {}
    if path is not None:
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            known = dict(zip(table["gene_id"], table["symbol"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no table with gene_id and symbol ({error})") from None
    if "feature_name" in var:
        known |= dict(zip(var.index.astype(str), var["feature_name"].astype(str)))
    return np.array([known.get(gene, gene) for gene in decoder.genes], dtype=object)
