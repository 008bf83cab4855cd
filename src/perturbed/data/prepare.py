"""The stage `prepare`: canonical names, quality control and fixed-target normalisation, free of any split.

Nothing here is a statistic over cells that enters the values: a cell's row depends on that cell alone. (The one
exception is `min_cells_per_gene`, off by default, which chooses columns.) Sparse throughout; the log-normalised matrix
shares the index arrays of the counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.annotation import (
    check_controls,
    check_unique,
    count_labels,
    dropped_cells,
    dropped_genes,
    label_cells,
    make_obs,
    name_genes,
)
from perturbed.data.cards import Card, Preparation
from perturbed.data.contracts import read_h5ad, write_h5ad
from perturbed.data.matrices import column_counts, find_values, normalise_log1p, row_sums, to_csr
from perturbed.data.raw import check_expectations
from perturbed.errors import DataError, suggest
from perturbed.names import CONTROL

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CellSums", "prepare", "write_h5ad"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Values:
    """The source's matrices: counts, log-normalised values or both, on the same cells and genes."""

    counts: sparse.csr_matrix | None
    log: sparse.csr_matrix | None

    @property
    def main(self) -> sparse.csr_matrix:
        """The matrix of which quality control and expectations speak: counts where there are any."""
        found = self.counts if self.counts is not None else self.log
        assert found is not None
        return found

    def take_rows(self, mask: np.ndarray) -> _Values:
        """Some cells; the same object where all are kept, so that nothing is copied."""
        if mask.all():
            return self
        return _Values(*(None if matrix is None else matrix[mask] for matrix in (self.counts, self.log)))

    def take_columns(self, mask: np.ndarray) -> _Values:
        """Some genes; the same object where all are kept."""
        if mask.all():
            return self
        return _Values(*(None if matrix is None else matrix[:, mask] for matrix in (self.counts, self.log)))


@dataclass(frozen=True)
class CellSums:
    """What quality control asks of each cell's values, over the genes that are kept."""

    totals: np.ndarray
    """Sum of the values (n_cells,)."""
    n_genes: np.ndarray
    """Detected genes (n_cells,)."""
    mito: np.ndarray | None = None
    """Sum over mitochondrial genes (n_cells,), where the card limits their share."""


def prepare(raw_path: str | Path, card: Card, name: str) -> AnnData:
    """Prepare a dataset: `raw.h5ad` to the content of `prepared.h5ad`.

    Cells are dropped by `keys.drop` and `keys.drop_matching`, features that are no genes by `keys.drop_genes`, labels
    made canonical and cells filtered by `card.prepare`. `X` is `log(1 + counts / depth * target_sum)`, the depth taken
    over all genes of the source, or the source's own values where `prepare.normalise` is none.

    Expectations of stage `raw` hold for the file as read (`n_obs`, `n_vars`, and `x_sum` where counts are in `X` or
    nowhere) and for its labels after `keys.drop`; those of stage `prepared` for the cells and genes of the result.

    Parameters
    ----------
    raw_path
        The source's h5ad; `uns["provenance"]` is carried along.
    card
        The dataset's card.
    name
        The dataset's name.

    Returns
    -------
    anndata.AnnData
        As `perturbed.data.contracts.check_prepared` demands; what was dropped and why is in `uns["perturbed"]`.

    Raises
    ------
    DataError
        Names the file, what is wrong with it and the mend.
    """
    where = str(raw_path)
    adata = read_h5ad(raw_path)
    check_unique(adata.obs_names, "cell", where, "make the names unique in the source")
    obs, provenance = adata.obs, adata.uns.get("provenance", {})
    var, renamed = name_genes(adata.var, card.keys, where)
    no_gene = dropped_genes(adata.var_names, card.keys)
    values = _take_values(adata, card, where)
    del adata
    if not len(obs):
        raise DataError(f"{where}: holds no cell; delete it and fetch it anew, or correct the card's source")
    kept = ~dropped_cells(obs, card.keys, where)
    if not kept.any():
        raise DataError(f"{where}: keys.drop drops every cell; correct it in the card")
    labels = label_cells(obs[kept], card.keys, var, where)
    _check_raw(values, labels, card, where)
    check_expectations({"n_kept": int(kept.sum()), "n_genes": int((~no_gene).sum())}, card.expect, where)
    dropped: dict[str, Any] = {"keys.drop": int((~kept).sum()), "keys.drop_genes": int(no_gene.sum())}

    obs, var = obs[kept], var[~no_gene]
    values = values.take_rows(kept)
    values = values.take_columns(~no_gene)
    table, totals = make_obs(obs, labels, card.keys, where), row_sums(values.main)
    mito = None if values.counts is None else find_mito(var, card.prepare, where)
    sums = CellSums(totals, np.diff(values.main.indptr), None if mito is None else row_sums(values.main, mito))
    passed, reasons = pass_quality(sums, table, card.prepare, where, has_counts=values.counts is not None)
    table, values, totals = table[passed], values.take_rows(passed), totals[passed]
    check_controls(table, labels, card.keys, where)
    values = _normalise(values, totals, card.prepare, where)
    enough = _detected(values, card.prepare)
    result = _assemble(values.take_columns(enough), table, var[enough])
    dropped |= {**reasons, "min_cells_per_gene": int((~enough).sum())}
    describe(result, card, name, where, dropped, renamed, provenance)
    return result


def describe(
    result: AnnData,
    card: Card,
    name: str,
    where: str,
    dropped: Mapping[str, Any],
    renamed: Mapping[str, str],
    provenance: Any,
) -> None:
    """Check what the card expects of the prepared cells, and write into `uns` what was done to them."""
    if card.expect.stage == "prepared":
        found = count_labels(np.asarray(result.obs["perturbation"].astype(str)))
        check_expectations({"n_obs": result.n_obs, "n_vars": result.n_vars, **found}, card.expect, f"{where}: prepared")
    result.uns["perturbed"] = {
        "dataset": name,
        "values": "log1p" if card.keys.counts is None else "counts",
        "target_sum": card.prepare.target_sum if card.prepare.normalise == "log1p" else "source",
        "upstream_genes": card.prepare.upstream_genes,
        "dropped": json.dumps(dropped, sort_keys=True),
        "renamed_genes": json.dumps(renamed, sort_keys=True),
        "provenance": _as_json(provenance),
    }
    log.info("%s: %d cells, %d genes; dropped %s", name, result.n_obs, result.n_vars, json.dumps(dropped))


def _check_raw(values: _Values, labels: np.ndarray, card: Card, where: str) -> None:
    check_raw_shape(values.main.shape, lambda: float(row_sums(values.main).sum()), labels, card, where)


def check_raw_shape(
    shape: tuple[int, int], x_sum: Callable[[], float], labels: np.ndarray, card: Card, where: str
) -> None:
    """Check what the card expects of the source as read; `x_sum` is called where it expects a sum."""
    if card.expect.stage != "raw":
        return
    found: dict[str, int | float | str] = {"n_obs": shape[0], "n_vars": shape[1], **count_labels(labels)}
    if card.expect.x_sum is not None and card.keys.counts in (None, "X"):
        found["x_sum"] = x_sum()
    check_expectations(found, card.expect, where)


# --- the source's values ------------------------------------------------------------------------------------------


Finder = Callable[[str], tuple[int, tuple[int, int] | None]]
"""From a kind of value to how many there are and where the first is, as `perturbed.data.matrices.find_values`."""


def _take_values(adata: AnnData, card: Card, where: str) -> _Values:
    """The matrices that are needed, as checked CSR float32; the others are let go."""
    check_keys(card, adata.layers, where)
    key, names = card.keys.counts, (adata.obs_names, adata.var_names)
    counts = logged = None
    if key is not None:
        counts = to_csr(adata.X if key == "X" else adata.layers.pop(key))
        check_counts(partial(find_values, counts), names, key, where)
    if card.prepare.normalise == "none":
        logged = to_csr(adata.X)
        check_logged(partial(find_values, logged), names, where)
    return _Values(counts, logged)


def check_keys(card: Card, layers: Iterable[str], where: str) -> None:
    """Check that what the card says of the matrices goes together, and that the layer it names is there."""
    key, from_counts = card.keys.counts, card.prepare.normalise == "log1p"
    if key is None and from_counts:
        raise DataError(
            f"{where}: keys.counts is null, so there is nothing to normalise; set prepare.normalise: none if X is "
            "log-normalised already, or name the counts in keys.counts"
        )
    if key == "X" and not from_counts:
        raise DataError(
            f"{where}: keys.counts says X holds counts, prepare.normalise: none that it is log-normalised; set "
            "keys.counts: null (or a layer), or prepare.normalise: log1p"
        )
    if key is not None and key != "X" and key not in layers:
        raise DataError(f"{where}: keys.counts: no layer {key!r}; {suggest(key, ['X', *layers])}")


def check_logged(find: Finder, names: tuple[pd.Index, pd.Index], where: str) -> None:
    """Check that `X` can be log-normalised values; `names` are those of cells and genes."""
    _check_values(find, names, f"{where}: X")
    if find("fraction")[0] == 0:
        raise DataError(
            f"{where}: X holds whole numbers only, so it is not log-normalised; set keys.counts: X and "
            "prepare.normalise: log1p"
        )


def _check_values(find: Finder, names: tuple[pd.Index, pd.Index], what: str) -> None:
    for kind, word in (("nan", "NaN"), ("inf", "infinite"), ("negative", "negative")):
        count, first = find(kind)
        if first is not None:
            cell, gene = names[0][first[0]], names[1][first[1]]
            raise DataError(
                f"{what} holds {count} {word} value(s), the first in cell {cell!r}, gene {gene!r}; correct the source, "
                "or name another matrix in keys.counts"
            )


def check_counts(find: Finder, names: tuple[pd.Index, pd.Index], key: str, where: str) -> None:
    """Check that a matrix can be counts; `names` are those of cells and genes."""
    what = f"{where}: {'X' if key == 'X' else f'layer {key!r}'}"
    _check_values(find, names, what)
    count, first = find("fraction")
    if first is not None:
        cell, gene = names[0][first[0]], names[1][first[1]]
        raise DataError(
            f"{what} holds {count} fractional value(s), the first in cell {cell!r}, gene {gene!r}, so these are no "
            "counts; set keys.counts: null and prepare.normalise: none, or name the matrix of counts in keys.counts"
        )


# --- quality control and normalisation ----------------------------------------------------------------------------


def find_mito(var: pd.DataFrame, spec: Preparation, where: str) -> np.ndarray | None:
    """Mitochondrial genes (n_genes,), where the card limits their share."""
    if spec.max_mito >= 1:
        return None
    mito = var["symbol"].str.lower().str.startswith("mt-").to_numpy(dtype=bool)
    if not mito.any():
        raise DataError(f"{where}: prepare.max_mito: no gene symbol starts with MT- or mt-; set it to 1")
    return np.asarray(mito)


def pass_quality(
    sums: CellSums, table: pd.DataFrame, spec: Preparation, where: str, *, has_counts: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which cells pass (n_cells,), and how many each threshold drops; controls are never too few."""
    if not has_counts and (spec.min_counts > 0 or spec.max_mito < 1):
        raise DataError(f"{where}: prepare.min_counts and max_mito need counts; name them in keys.counts or unset them")
    failed: dict[str, np.ndarray] = {}
    if spec.min_counts > 0:
        failed["min_counts"] = sums.totals < spec.min_counts
    if spec.min_genes > 0:
        failed["min_genes"] = sums.n_genes < spec.min_genes
    if spec.max_genes is not None:
        failed["max_genes"] = sums.n_genes > spec.max_genes
    if sums.mito is not None:
        failed["max_mito"] = sums.mito > spec.max_mito * sums.totals
    reasons: dict[str, Any] = {key: int(mask.sum()) for key, mask in failed.items()}
    passed = np.ones(len(table), dtype=bool)
    for mask in failed.values():
        passed &= ~mask
    sizes = table.loc[passed, "perturbation"].astype(str).value_counts()
    few = sizes[(sizes < spec.min_cells_per_perturbation) & (sizes.index != CONTROL)]
    if len(few):
        reasons["min_cells_per_perturbation"] = {name: int(few[name]) for name in sorted(few.index)}
        passed &= ~table["perturbation"].isin(few.index).to_numpy()
    if not passed.any():
        raise DataError(f"{where}: no cell passes quality control ({reasons}); loosen the card's prepare section")
    return passed, reasons


def _normalise(values: _Values, totals: np.ndarray, spec: Preparation, where: str) -> _Values:
    if values.log is not None:
        return values
    assert values.counts is not None
    check_depths(totals, where)
    return _Values(values.counts, normalise_log1p(values.counts, totals, spec.target_sum))


def check_depths(totals: np.ndarray, where: str) -> None:
    """Check that every cell can be normalised."""
    if (totals == 0).any():
        raise DataError(
            f"{where}: {int((totals == 0).sum())} cells hold no counts and cannot be normalised; set "
            "prepare.min_counts: 1"
        )


def _detected(values: _Values, spec: Preparation) -> np.ndarray:
    """Genes detected in enough cells (n_genes,); the values of the others do not change by it."""
    if spec.min_cells_per_gene == 0:
        return np.ones(values.main.shape[1], dtype=bool)
    return column_counts(values.main) >= spec.min_cells_per_gene


def _assemble(values: _Values, obs: pd.DataFrame, var: pd.DataFrame) -> AnnData:
    import anndata

    result = anndata.AnnData(values.log, obs=drop_unused_categories(obs), var=var)
    if values.counts is not None:
        result.layers["counts"] = values.counts
    return result


def drop_unused_categories(obs: pd.DataFrame) -> pd.DataFrame:
    """A copy whose categories all occur."""
    obs = obs.copy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    return obs


def _as_json(value: Any) -> str:
    """Provenance as JSON text; numpy scalars and arrays as plain values."""
    if isinstance(value, str):
        return value
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(
        plain, sort_keys=True, default=lambda item: item.tolist() if hasattr(item, "tolist") else str(item)
    )
