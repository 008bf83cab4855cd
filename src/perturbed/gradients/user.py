"""Gene scores and flows of a saved scvi-tools model and an h5ad: gradients for those who bring their own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbed.data.matrices import read_rows
from perturbed.data.ondisk import MatrixOnDisk
from perturbed.decoders.base import Encoded, take
from perturbed.decoders.scvi import SCVIDecoder, load_scvi
from perturbed.errors import DataError, suggest
from perturbed.files import atomic
from perturbed.gradients.flow import Move, follow, map_flow, velocity
from perturbed.gradients.gene_scores import score_genes
from perturbed.gradients.projection import MAX_MOVED, MAX_UMAP, draw_rows, project_by_umap, project_linearly

CHUNK = 8192
"""Cells read and encoded at a time."""
ARMS = ("unperturbed", "perturbed")


class _Source(NamedTuple):
    """An h5ad with its tables in memory and its counts, where they are CSR, on disk."""

    path: Path
    obs: pd.DataFrame
    genes: list[str]
    matrix: Any

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of some cells, ascending."""
        return read_rows(self.matrix, rows)


def score_saved_model(
    model_dir: str | Path,
    h5ad: str | Path,
    out: str | Path,
    *,
    column: str,
    unperturbed: Sequence[str],
    perturbed: Sequence[str],
    batch: str | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    per: str | None = None,
    logits: bool = False,
    flow_genes: Sequence[str] = (),
    knock_down: bool = False,
    umap: bool = False,
    n_steps: int = 20,
    delta: float = 0.05,
    n_cells: int = 2000,
    min_cells: int = 20,
    trust_sha256: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score every gene of a saved SCVI model along the axis from unperturbed to perturbed cells, and draw flows.

    The axis is the difference of the mean latents of all cells of the two arms. Scores are mean cosines of the genes'
    gradients with it (`perturbed.gradients.gene_scores`), over unperturbed and over perturbed cells. Counts are read
    in chunks; the latents of all cells are kept.

    Parameters
    ----------
    model_dir
        Folder that scvi-tools saved, with `model.pt`.
    h5ad
        Cells with raw counts. CSR matrices stay on disk, others are read whole.
    out
        Folder to write: `gene_scores.csv` and, for each gene of `flow_genes`, `flow_GENE.svg`, `.png` and `.csv`.
    column, unperturbed, perturbed
        `obs` column and its values for the two arms.
    batch
        `obs` column of the batch; None takes the column that the model was trained with.
    layer
        Layer of the counts; None takes X.
    gene_column
        `var` column that names genes as the model does; None takes the index.
    per
        `obs` column, such as the cell type: scores and axis for each of its values apart.
    logits
        Score what stands before softmax, which does not couple genes.
    flow_genes
        Genes whose flow is drawn.
    knock_down
        Flows against the gradient.
    umap
        Draw flows on a UMAP beside the principal components.
    n_steps, delta
        Steps of the UMAP's arrows, and their size.
    n_cells
        Most cells of each arm (and group) that are scored; the axis takes all.
    min_cells
        Groups of `per` with fewer cells in either arm are left out.
    trust_sha256
        Hash of a `model.pt` that may be unpickled in full.
    seed
        Of the choice of cells and of the UMAP.

    Returns
    -------
    pandas.DataFrame
        One row per group, arm and gene: `group`, `cells` (the arm), `gene`, `cosine`, `projection`, `norm`, `n_cells`;
        the highest cosine first.

    Raises
    ------
    DataError
        If the model or a column, value, gene or batch is missing, or a group is too small.
    """
    decoder = load_scvi(model_dir, trust_sha256)
    decoder.find(tuple(flow_genes))  # before any work
    source = _open(Path(h5ad), layer, gene_column)
    arm = _arms(source, column, unperturbed, perturbed)
    rows = np.flatnonzero(arm >= 0)
    arm = arm[rows]
    group = np.full(len(rows), "all", dtype=object) if per is None else _column(source, per)[rows]
    cells = _encode(decoder, source, rows, _batches(decoder, source, batch)[rows])
    table = pd.concat(_score(decoder, cells, arm, group, n_cells, min_cells, seed, logits), ignore_index=True)
    with atomic(out) as part:
        part.mkdir()
        table.to_csv(part / "gene_scores.csv", index=False, float_format="%.6g", lineterminator="\n")
        for gene in flow_genes:
            move = Move((gene,), -1 if knock_down else 1)
            tables = _flow_tables(decoder, cells, arm, move, umap=umap, n_steps=n_steps, delta=delta, seed=seed)
            _draw(tables, gene, part / f"flow_{gene}")
    return table


# --- reading ------------------------------------------------------------------------------------------------------


def _open(path: Path, layer: str | None, gene_column: str | None) -> _Source:
    from anndata.io import read_elem

    if not path.is_file():
        raise DataError(f"{path}: no such file; correct the path of the h5ad")
    try:
        file = h5py.File(path, "r")
        obs, var = read_elem(file["obs"]), read_elem(file["var"])
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        raise DataError(f"{path}: not a readable h5ad ({' '.join(str(error).split())[:160]})") from None
    if layer is not None and layer not in file.get("layers", {}):
        raise DataError(f"{path}: no layer {layer!r}; {suggest(layer, file.get('layers', {}))}")
    if gene_column is not None and gene_column not in var:
        raise DataError(f"{path}: no var column {gene_column!r}; {suggest(gene_column, map(str, var.columns))}")
    element = file["X"] if layer is None else file["layers"][layer]
    on_disk = isinstance(element, h5py.Group) and element.attrs.get("encoding-type") == "csr_matrix"
    matrix = MatrixOnDisk(element) if on_disk else sparse.csr_matrix(read_elem(element))
    genes = var.index if gene_column is None else var[gene_column]
    return _Source(path, obs, list(genes.astype(str)), matrix)


def _column(source: _Source, name: str) -> np.ndarray:
    if name not in source.obs:
        raise DataError(f"{source.path}: no obs column {name!r}; {suggest(name, map(str, source.obs.columns))}")
    return np.asarray(source.obs[name].astype(str), dtype=object)


def _arms(source: _Source, column: str, unperturbed: Sequence[str], perturbed: Sequence[str]) -> np.ndarray:
    """0 for unperturbed, 1 for perturbed, −1 for other cells (n_cells,)."""
    values = _column(source, column)
    arm = np.full(len(values), -1)
    for k, wanted in enumerate((unperturbed, perturbed)):
        for value in wanted:
            inside = values == value
            if not inside.any():
                raise DataError(f"{source.path}: no cell has {column} {value!r}; {suggest(value, set(values))}")
            if (arm[inside] >= 0).any():
                raise DataError(f"{column} {value!r} cannot be both unperturbed and perturbed")
            arm[inside] = k
    return arm


def _batches(decoder: SCVIDecoder, source: _Source, column: str | None) -> np.ndarray:
    if column is None and len(decoder.batches) == 1:
        return np.full(len(source.obs), decoder.batches[0], dtype=object)
    name = column or decoder.batch_column or ""
    if name not in source.obs:
        raise DataError(
            f"{source.path}: the model was trained with batches of a column {decoder.batch_column!r}, which is not in "
            f"obs; name the column that holds them ({suggest(name, map(str, source.obs.columns))})"
        )
    return _column(source, name)


def _encode(decoder: SCVIDecoder, source: _Source, rows: np.ndarray, batch: np.ndarray) -> Encoded:
    decoder.context(list(dict.fromkeys(batch)))  # an unknown batch is told before any work
    parts = []
    for start in range(0, len(rows), CHUNK):
        inside = slice(start, start + CHUNK)
        try:
            counts = decoder.arrange(source.rows(rows[inside]), source.genes)
        except DataError as error:
            raise DataError(f"{source.path}: {error}") from None
        parts.append(decoder.encode(counts, list(batch[inside])))
    context = {key: torch.cat([part.context[key] for part in parts]) for key in parts[0].context}
    return Encoded(torch.cat([p.mean for p in parts]), torch.cat([p.sd for p in parts]), context)


# --- scores and flows ---------------------------------------------------------------------------------------------


def _score(
    decoder: SCVIDecoder,
    cells: Encoded,
    arm: np.ndarray,
    group: np.ndarray,
    n_cells: int,
    min_cells: int,
    seed: int,
    logits: bool,
) -> list[pd.DataFrame]:
    z, found = cells.mean.numpy(), []
    for name in sorted(set(group)):
        arms = [np.flatnonzero((group == name) & (arm == k)) for k in (0, 1)]
        if min(map(len, arms)) < min_cells:
            continue
        axis = z[arms[1]].mean(axis=0, dtype=np.float64) - z[arms[0]].mean(axis=0, dtype=np.float64)
        for label, inside in zip(ARMS, arms):
            rows = torch.from_numpy(draw_rows(len(z), n_cells, seed, inside))
            scores = score_genes(decoder, cells.mean[rows], take(cells.context, rows), axis, logits=logits)
            columns = {"cosine": scores.cosine[0], "projection": scores.projection[0], "norm": scores.norm[0]}
            table = pd.DataFrame(
                {"group": name, "cells": label, "gene": decoder.genes, **columns, "n_cells": len(rows)}
            )
            found.append(table.sort_values("cosine", ascending=False, kind="stable"))
    if not found:
        raise DataError(f"no group has {min_cells} cells in each arm; lower min_cells")
    return found


def _flow_tables(
    decoder: SCVIDecoder,
    cells: Encoded,
    arm: np.ndarray,
    move: Move,
    *,
    umap: bool,
    n_steps: int,
    delta: float,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Tables of `perturbed.figures.flow.draw_map`, and `umap` with the ends of arrows."""
    rows = draw_rows(len(arm), MAX_UMAP, seed)
    index = torch.from_numpy(rows)
    context = take(cells.context, index)
    arrows = velocity(decoder, cells.mean[index], context, [move]).numpy()
    z = cells.mean[index].numpy()
    place, arrow = project_linearly(z, arrows)
    names = np.array(ARMS)[arm[rows]]
    tables = {
        "cells": pd.DataFrame({"x": place[:, 0], "y": place[:, 1], "u": arrow[:, 0], "v": arrow[:, 1], "arm": names})
    }
    if decoder.n_latent == 2:
        field = map_flow(decoder, z, context, [move])
        x, y = np.meshgrid(field.x, field.y)
        columns = {"x": x, "y": y, "u": field.u, "v": field.v, "inside": field.inside}
        tables["field"] = pd.DataFrame({key: value.ravel() for key, value in columns.items()})
    if umap:
        moved = draw_rows(len(rows), MAX_MOVED, seed, np.flatnonzero(arm[rows] == 0))
        some = torch.from_numpy(moved)
        # equal steps: the gradient of a share is as small as the share
        path = follow(decoder, z[moved], take(context, some), [move], n_steps=n_steps, delta=delta, unit=True)
        place, ends = project_by_umap(z, path.z[0], path.z[-1], seed)
        shift = np.full((len(rows), 2), np.nan)
        shift[moved] = ends[1] - ends[0]
        origin = place.copy()
        origin[moved] = ends[0]
        tables["umap"] = pd.DataFrame(
            {"x": origin[:, 0], "y": origin[:, 1], "u": shift[:, 0], "v": shift[:, 1], "arm": names}
        )
    return tables


def _draw(tables: dict[str, pd.DataFrame], gene: str, stem: Path) -> None:
    import matplotlib as mpl

    from perturbed.figures.flow import draw_map
    from perturbed.figures.style import RC, new_figure, save

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        n_panels = 1 + ("umap" in tables)
        figure = new_figure(4.8 * n_panels, 4.6)
        panels = figure.subplots(1, n_panels, squeeze=False)[0]
        judged = {"agreement_seeds": pd.DataFrame({"judged": ["all"]})}  # one model, all of its cells
        draw_map(panels[0], tables | judged)
        panels[0].set_title(f"Flow of {gene}", loc="left")
        if "umap" in tables:
            _draw_umap(panels[1], tables["umap"])
        source = pd.concat([table.assign(table=name) for name, table in tables.items()], ignore_index=True)
        save(figure, source, stem)


def _draw_umap(axes: Any, table: pd.DataFrame) -> None:
    """Arrows from cells to where their steps lead, at true length."""
    from perturbed.figures.flow import ARMS as COLOURS

    for arm in ARMS:
        inside = table["arm"] == arm
        look = {"color": COLOURS[arm], "s": 4, "lw": 0, "alpha": 0.35, "rasterized": True}
        axes.scatter(table.loc[inside, "x"], table.loc[inside, "y"], label=arm, **look)
    moved = table[table["u"].notna()]
    look = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.0028, "color": "#222222", "zorder": 4}
    axes.quiver(moved["x"], moved["y"], moved["u"], moved["v"], **look)
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title("From cells to their steps", loc="left")
