"""The files that stages hand to each other: what each holds, checked when written and when read.

Everything is keyed by name (cells, genes, perturbations); nothing depends on the order of rows or columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.data.tables import read_table, write_table
from perturbed.errors import DataError
from perturbed.files import atomic

if TYPE_CHECKING:
    from anndata import AnnData

PARTS = ("train", "val", "test", "unused")
SUBGROUPS = ("single_unseen", "single_seen_heldout_cells", "combo_seen0", "combo_seen1", "combo_seen2", "context")
SCORE_COLUMNS = (
    "dataset", "split", "fold", "method", "seed", "context", "perturbation", "subgroup",
    "n_cells", "effect_size", "metric", "value", "reason",
)  # fmt: skip


# --- AnnData files ------------------------------------------------------------------------------------------------


def read_h5ad(path: str | Path) -> AnnData:
    """Read an h5ad file.

    Raises
    ------
    DataError
        If the file is missing, truncated or no h5ad.
    """
    import anndata

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; make it with the stage before, or correct the path")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        raise _unreadable(path, error) from None


def _unreadable(path: str | Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path}: not a readable h5ad ({reason}); it may be truncated, delete it and rerun")


def write_h5ad(path: str | Path, adata: AnnData) -> None:
    """Write an h5ad file, whole or not at all; equal content is equal bytes (which lzf does not promise)."""
    with atomic(path) as part:
        adata.write_h5ad(part, compression="gzip", compression_opts=1)


def check_prepared(adata: AnnData, path: str | Path) -> None:
    """Check the contract of `prepared.h5ad`.

    `X` log1p-normalised float32 CSR; `obs`: `perturbation` (canonical), `n_perturbed`, `context`; `var`: `gene_id`,
    `symbol`; `layers["counts"]` where `uns["perturbed"]["values"] == "counts"`; unique cell and gene names.

    Raises
    ------
    DataError
        Names the file, the breach and the mend.
    """
    problems = [
        f"obs[{key!r}] is missing" for key in ("perturbation", "n_perturbed", "context") if key not in adata.obs
    ]
    problems += [f"var[{key!r}] is missing" for key in ("gene_id", "symbol") if key not in adata.var]
    problems += ["cell names repeat"] * (not adata.obs_names.is_unique)
    problems += ["gene names repeat"] * (not adata.var_names.is_unique)
    problems += ["uns['perturbed'] is missing"] * ("perturbed" not in adata.uns)
    if problems:
        raise DataError(f"{path}: not a prepared file: {', '.join(problems)}; make it with `perturbed prepare`")


def read_prepared(path: str | Path) -> AnnData:
    """Read `prepared.h5ad` and check its contract."""
    adata = read_h5ad(path)
    check_prepared(adata, path)
    return adata


def open_prepared(path: str | Path) -> AnnData:
    """`prepared.h5ad` with its tables in memory and its matrices on disk; see `perturbed.data.matrices.read_rows`.

    anndata's own backed mode keeps only `X` on disk and reads every layer.
    """
    import anndata
    import h5py

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed prepare`, or correct the path")
    try:
        file = h5py.File(path, "r")
        tables = {key: anndata.io.read_elem(file[key]) for key in ("obs", "var", "uns")}
        layers = {key: anndata.io.sparse_dataset(file["layers"][key]) for key in file.get("layers", {})}
        adata = anndata.AnnData(X=anndata.io.sparse_dataset(file["X"]), layers=layers, **tables)
    except Exception as error:
        raise _unreadable(path, error) from None
    check_prepared(adata, path)
    return adata


# --- splits and features --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A frozen split.

    Parameters
    ----------
    table
        Index `cell`; columns `perturbation`, `part` (one of `PARTS`), `subgroup` (one of `SUBGROUPS` for test cells of
        perturbations, else empty).
    header
        `dataset`, `split`, `fold`, `seed`, `spec` and, when read, `sha256`.
    """

    table: pd.DataFrame
    header: dict[str, Any] = field(default_factory=dict)

    def cells(self, *parts: str) -> pd.Index:
        """Names of the cells in any of `parts`, in the file's order."""
        return self.table.index[self.table["part"].isin(parts)]


def write_split(path: str | Path, split: Split) -> None:
    """Write `split.csv`."""
    _check_split(split, path)
    table = split.table.rename_axis("cell").reset_index()[["cell", "perturbation", "part", "subgroup"]]
    write_table(path, table, {key: value for key, value in split.header.items() if key != "sha256"})


def read_split(path: str | Path) -> Split:
    """Read and check `split.csv`."""
    table, header = read_table(path, dtype=str)
    missing = {"cell", "perturbation", "part", "subgroup"} - set(table.columns)
    if missing:
        raise DataError(f"{path}: column {sorted(missing)[0]!r} is missing; make the file with `perturbed split`")
    split = Split(table.fillna({"subgroup": ""}).set_index("cell"), header)
    _check_split(split, path)
    return split


def _check_split(split: Split, path: str | Path) -> None:
    table = split.table
    unknown = set(table["part"]) - set(PARTS)
    if unknown:
        raise DataError(f"{path}: part {sorted(unknown)[0]!r} is not one of {', '.join(PARTS)}")
    if not table.index.is_unique:
        raise DataError(f"{path}: cell {table.index[table.index.duplicated()][0]!r} stands in two rows")
    for part in ("train", "test"):
        if not (table["part"] == part).any():
            raise DataError(f"{path}: the {part} part is empty; loosen the split's fractions or minimum cells")


@dataclass(frozen=True)
class Features:
    """Genes, scaling and PCA of one split, from its training cells only.

    Parameters
    ----------
    table
        Index `gene`; columns `mean` and `sd` of the training cells' log-normalised values, `pc1` … `pcK` (loadings).
    header
        `split_sha256`, `upstream` (true where the source chose the genes on all cells), `spec`, `n_cells`.
    """

    table: pd.DataFrame
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def genes(self) -> pd.Index:
        """Gene names, in the order of every matrix made from these features."""
        return self.table.index

    @property
    def mean(self) -> np.ndarray:
        """Training mean per gene (n_genes,)."""
        return self.table["mean"].to_numpy()

    @property
    def loadings(self) -> np.ndarray:
        """PCA loadings (n_genes, n_pcs), orthonormal columns; scores are `(x - mean) @ loadings`."""
        return self.table[[c for c in self.table.columns if c.startswith("pc")]].to_numpy()


def write_features(path: str | Path, features: Features) -> None:
    """Write `features.csv`."""
    header = {key: value for key, value in features.header.items() if key != "sha256"}
    write_table(path, features.table.rename_axis("gene").reset_index(), header)


def read_features(path: str | Path) -> Features:
    """Read and check `features.csv`."""
    table, header = read_table(path, dtype={"gene": str})
    missing = {"gene", "mean", "sd", "pc1"} - set(table.columns)
    if missing:
        raise DataError(f"{path}: column {sorted(missing)[0]!r} is missing; make the file with `perturbed features`")
    return Features(table.set_index("gene"), header)


# --- predictions and scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Predicted mean expression of perturbations.

    Parameters
    ----------
    mean
        Log-normalised expression (n_predictions, n_genes).
    genes
        Gene names of the columns.
    perturbation, context
        Canonical names of the rows.
    variance
        Variance over cells, same shape as `mean`, where the method predicts it.
    refused
        Perturbations the method cannot predict, with the reason.
    cells
        Sampled cells per row, each (n_cells, n_genes), where the method generates cells.
    meta
        `dataset`, `split`, `fold`, `method`, `seed`, `split_sha256` as far as known.
    """

    mean: np.ndarray
    genes: tuple[str, ...]
    perturbation: tuple[str, ...]
    context: tuple[str, ...]
    variance: np.ndarray | None = None
    refused: dict[str, str] = field(default_factory=dict)
    cells: tuple[np.ndarray, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def write_prediction(path: str | Path, prediction: Prediction) -> None:
    """Write `prediction.h5ad`, and the sampled cells beside it as `cells.h5ad` where there are any."""
    import anndata

    obs = pd.DataFrame({"perturbation": prediction.perturbation, "context": prediction.context}, dtype=str)
    var = pd.DataFrame(index=pd.Index(prediction.genes, dtype=str))
    obs.index = obs["perturbation"] + "|" + obs["context"]
    adata = anndata.AnnData(np.asarray(prediction.mean, dtype=np.float32), obs=obs, var=var)
    if prediction.variance is not None:
        adata.layers["variance"] = np.asarray(prediction.variance, dtype=np.float32)
    adata.uns["refused"] = json.dumps(prediction.refused, sort_keys=True)
    adata.uns["meta"] = json.dumps(prediction.meta, sort_keys=True)
    _check_prediction(adata, path)
    beside = Path(path).with_name("cells.h5ad")
    if prediction.cells is None:
        beside.unlink(missing_ok=True)  # of an earlier prediction; it would be read as this one's
    else:
        rows = obs.iloc[np.repeat(np.arange(len(obs)), [len(block) for block in prediction.cells])]
        rows = rows.set_axis([f"{name}|{i}" for i, name in enumerate(rows.index)])
        write_h5ad(beside, anndata.AnnData(np.vstack(prediction.cells).astype(np.float32), obs=rows, var=var))
    write_h5ad(path, adata)


def read_prediction(path: str | Path) -> Prediction:
    """Read and check `prediction.h5ad` (and `cells.h5ad` beside it), ours or a user's own.

    A user's file needs only `X`, gene names in `var_names` and `obs["perturbation"]`; the context defaults to `all`.
    """
    adata = read_h5ad(path)
    if "context" not in adata.obs:
        adata.obs["context"] = "all"
    _check_prediction(adata, path)
    obs = adata.obs.astype({"perturbation": str, "context": str})
    beside = Path(path).with_name("cells.h5ad")
    cells = None
    if beside.is_file() and "meta" in adata.uns:
        sampled = read_h5ad(beside)
        if {"perturbation", "context"} - set(sampled.obs) or not sampled.var_names.equals(adata.var_names):
            raise DataError(
                f"{beside}: not the sampled cells of {Path(path).name}; delete both and rerun the prediction"
            )
        keys = sampled.obs["perturbation"].astype(str) + "|" + sampled.obs["context"].astype(str)
        positions = sampled.obs.groupby(keys.to_numpy(), sort=False).indices
        wanted = [f"{p}|{c}" for p, c in zip(obs["perturbation"], obs["context"])]
        absent = [key for key in wanted if key not in positions]
        if absent:
            raise DataError(f"{beside}: has no cells of {absent[0]!r}; delete it and {path}, and rerun the prediction")
        cells = tuple(_dense(sampled.X[positions[key]]) for key in wanted)
    return Prediction(
        mean=_dense(adata.X),
        genes=tuple(adata.var_names.astype(str)),
        perturbation=tuple(obs["perturbation"]),
        context=tuple(obs["context"]),
        variance=_dense(adata.layers["variance"]) if "variance" in adata.layers else None,
        refused=json.loads(adata.uns.get("refused", "{}")),
        cells=cells,
        meta=json.loads(adata.uns.get("meta", "{}")),
    )


def _dense(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)


def _check_prediction(adata: AnnData, path: str | Path) -> None:
    if "perturbation" not in adata.obs:
        raise DataError(f"{path}: obs['perturbation'] is missing; name the perturbation of each row there")
    keys = adata.obs["perturbation"].astype(str) + "|" + adata.obs["context"].astype(str)
    if keys.duplicated().any():
        raise DataError(f"{path}: {keys[keys.duplicated()].iloc[0]!r} is predicted twice; give one row each")
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        raise DataError(f"{path}: gene {twice!r} occurs twice; name each once")
    finite = np.isfinite(_dense(adata.X)).all(axis=1)
    if not finite.all():
        name = keys[~finite].iloc[0]
        raise DataError(f"{path}: the prediction of {name!r} holds NaN or inf; leave that row out, or predict numbers")


def write_scores(path: str | Path, scores: pd.DataFrame) -> None:
    """Write the long table of scores, sorted by its keys."""
    table = scores.loc[:, list(SCORE_COLUMNS)].sort_values([*SCORE_COLUMNS[:8], "metric"], kind="stable")
    types: dict[str, Any] = {
        "fold": int,
        "seed": int,
        "n_cells": int,
        "effect_size": float,
        "value": float,
        "reason": "string",
    }
    with atomic(path) as part:
        table.reset_index(drop=True).astype(types).to_parquet(part, index=False)


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read and check the long table of scores."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; make it with `perturbed evaluate`")
    try:
        table = pd.read_parquet(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path}: not a readable parquet file ({reason}); delete it and rerun `perturbed evaluate`"
        ) from None
    missing = set(SCORE_COLUMNS) - set(table.columns)
    if missing:
        raise DataError(f"{path}: column {sorted(missing)[0]!r} is missing; make the file with `perturbed evaluate`")
    return table
