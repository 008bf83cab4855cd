"""Read a split's truth from `prepared.h5ad`: one pass over the rows it needs, in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Features, Split, read_features, read_split
from perturbed.errors import DataError
from perturbed.evaluation.differential import Moments, add_up
from perturbed.evaluation.reading import CellFile
from perturbed.evaluation.truth import ContextTruth, Pool, Truth, generator
from perturbed.names import CONTROL, genes_of

_PCA_CELLS = 10_000
_PCA_COMPONENTS = 50

Group = tuple[str, str, bool]
"""Perturbation, context, and whether its cells are in the test part."""


def load_truth(
    prepared: str | Path, split: str | Path, spec: EvaluationSpec, *, features: str | Path | None = None
) -> Truth:
    """Everything the metrics need to know of the test cells.

    Parameters
    ----------
    prepared, split, features
        The files of these names. Without `features` all genes are scored, and the PCA of the distribution metrics is
        computed from training cells (at most 10,000 of them).
    spec
        How many cells are drawn, and the seed.

    Raises
    ------
    DataError
        If the files do not belong together, or a test context has no training control cells.
    """
    frozen = read_split(split)
    chosen = None if features is None else read_features(features)
    if chosen is not None and chosen.header.get("split_sha256", frozen.header["sha256"]) != frozen.header["sha256"]:
        raise DataError(f"{features}: made for another split than {split}; rerun `perturbed features`")
    with CellFile(prepared) as file:
        columns = _columns(file, chosen, features)
        cells = _join(file, frozen, prepared, split)
        kept = _draw_kept(cells, spec)
        moments, matrix = _stream(file, columns, cells, kept)
        genes = pd.DataFrame({"name": file.var.index.astype(str), "symbol": file.var["symbol"].astype(str).to_numpy()})
    header = {
        "dataset": frozen.header.get("dataset", Path(prepared).stem),
        "split": frozen.header.get("split", Path(split).stem),
        "fold": int(frozen.header.get("fold", 0)),
        "split_sha256": frozen.header["sha256"],
    }
    _check_controls(moments, split)

    def basis() -> tuple[np.ndarray, np.ndarray]:
        if chosen is not None:
            return chosen.mean, chosen.loadings
        return _fit_pca(prepared, columns, cells, spec)

    pool = Pool(matrix, basis)
    return _assemble(genes.iloc[columns], cells, kept, moments, pool, spec, header)


def _columns(file: CellFile, features: Features | None, path: str | Path | None) -> np.ndarray:
    """Positions in the file of the genes scored."""
    if features is None:
        return np.arange(len(file.var))
    columns = file.var.index.get_indexer(features.genes)
    if (columns < 0).any():
        missing = features.genes[columns < 0]
        raise DataError(f"{path}: gene {missing[0]!r} is not in {file.path}; the files belong to different data")
    return np.asarray(columns)


def _join(file: CellFile, split: Split, prepared: str | Path, path: str | Path) -> pd.DataFrame:
    """One row per used cell, in order of the cells' names: position, perturbation, context, test, subgroup."""
    table = split.table[split.table["part"] != "unused"].sort_index()
    positions = file.obs.index.get_indexer(table.index)
    if (positions < 0).any():
        missing = table.index[positions < 0][0]
        raise DataError(f"{path}: cell {missing!r} is not in {prepared}; the split was made for other data")
    obs = file.obs.iloc[positions]
    differs = obs["perturbation"].astype(str).to_numpy() != table["perturbation"].to_numpy()
    if differs.any():
        cell = table.index[differs][0]
        raise DataError(f"{path}: cell {cell!r} has another perturbation in {prepared}; rerun `perturbed split`")
    return pd.DataFrame(
        {
            "position": positions,
            "perturbation": table["perturbation"].to_numpy(),
            "context": obs["context"].astype(str).to_numpy(),
            "test": (table["part"] == "test").to_numpy(),
            "subgroup": table["subgroup"].to_numpy(),
        }
    )


def _groups(cells: pd.DataFrame) -> dict[Group, np.ndarray]:
    """Rows of `cells` of every group, in sorted order of the groups."""
    columns = [cells[name].to_list() for name in ("perturbation", "context", "test")]
    found: dict[Group, list[int]] = {}
    for row, group in enumerate(zip(*columns)):
        found.setdefault(group, []).append(row)
    return {group: np.array(found[group]) for group in sorted(found)}


def _draw_kept(cells: pd.DataFrame, spec: EvaluationSpec) -> dict[Group, np.ndarray]:
    """File positions of the cells that stay in memory: all test cells of perturbations, drawn control cells."""
    kept: dict[Group, np.ndarray] = {}
    for group, rows in _groups(cells).items():
        perturbation, context, test = group
        positions = cells["position"].to_numpy()[rows]
        if perturbation == CONTROL:
            stream = generator(spec.seed, "control", context, "test" if test else "train")
            kept[group] = stream.permutation(positions)[: spec.max_cells]
        elif test:
            kept[group] = positions
    return kept


def _stream(
    file: CellFile, columns: np.ndarray, cells: pd.DataFrame, kept: Mapping[Group, np.ndarray]
) -> tuple[dict[Group, Moments], sparse.csr_matrix]:
    """Moments of every group of used cells, and the kept cells in the order of `kept`."""
    groups = _groups(cells)
    code = np.full(len(file.obs), -1)
    for i, rows in enumerate(groups.values()):
        code[cells["position"].to_numpy()[rows]] = i
    order = np.concatenate(list(kept.values()))
    stay = np.zeros(len(file.obs), dtype=bool)
    stay[order] = True
    sums = np.zeros((2, len(groups), len(columns)))
    parts = []
    for rows, block in file.blocks(cells["position"].to_numpy(), columns):
        present, local = np.unique(code[rows], return_inverse=True)
        members = sparse.csr_matrix((np.ones(len(rows)), (local, np.arange(len(rows)))))
        values = block.astype(np.float64)
        sums[0, present] += (members @ values).toarray()
        sums[1, present] += (members @ values.power(2)).toarray()
        parts.append(block[stay[rows]])
    ranks = np.searchsorted(np.sort(order), order)  # kept rows come in file order; bring them into the order of `kept`
    matrix = sparse.csr_matrix(sparse.vstack(parts))[ranks]
    moments = {group: Moments(len(rows), sums[0, i], sums[1, i]) for i, (group, rows) in enumerate(groups.items())}
    return moments, matrix


def _fit_pca(
    prepared: str | Path, columns: np.ndarray, cells: pd.DataFrame, spec: EvaluationSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and PCA loadings of training cells, where no features.csv brings them."""
    from sklearn.decomposition import PCA

    training = cells["position"].to_numpy()[~cells["test"].to_numpy()]
    training = generator(spec.seed, "pca").permutation(training)[:_PCA_CELLS]
    with CellFile(prepared) as file:
        matrix = file.take(training, columns).astype(np.float64)
    count = min(_PCA_COMPONENTS, min(matrix.shape) - 1)
    pca = PCA(count, svd_solver="arpack", random_state=spec.seed).fit(matrix)
    return pca.mean_, pca.components_.T


def _check_controls(moments: Mapping[Group, Moments], split: str | Path) -> None:
    for perturbation, context, test in moments:
        if test and perturbation != CONTROL and (CONTROL, context, False) not in moments:
            raise DataError(
                f"{split}: context {context!r} has test cells but no control cells in train or val; "
                "lower control_test_fraction or choose other contexts"
            )


def _assemble(
    genes: pd.DataFrame,
    cells: pd.DataFrame,
    kept: Mapping[Group, np.ndarray],
    moments: Mapping[Group, Moments],
    pool: Pool,
    spec: EvaluationSpec,
    header: dict[str, Any],
) -> Truth:
    ends = np.cumsum([len(rows) for rows in kept.values()])
    pool_rows = {group: np.arange(end - len(rows), end) for (group, rows), end in zip(kept.items(), ends)}
    tested = sorted((c, p) for p, c, test in moments if test and p != CONTROL)
    subgroup = cells[cells["test"]].groupby(["perturbation", "context"])["subgroup"].min()
    conditions = pd.DataFrame(
        {
            "perturbation": [p for _, p in tested],
            "context": [c for c, _ in tested],
            "subgroup": [subgroup[p, c] for c, p in tested],
        }
    )
    names, symbols = genes["name"].to_numpy(), genes["symbol"].to_numpy()
    return Truth(
        genes=tuple(names),
        conditions=conditions,
        targets=tuple(np.flatnonzero(np.isin(names, genes_of(p)) | np.isin(symbols, genes_of(p))) for _, p in tested),
        moments=tuple(moments[p, c, True] for c, p in tested),
        rows=tuple(pool_rows[p, c, True] for c, p in tested),
        contexts={context: _context(context, moments, pool_rows) for context in sorted({c for c, _ in tested})},
        pool=pool,
        spec=spec,
        header=header,
    )


def _context(context: str, moments: Mapping[Group, Moments], rows: Mapping[Group, np.ndarray]) -> ContextTruth:
    control = moments[CONTROL, context, False].mean
    held_out = moments.get((CONTROL, context, True))
    trained = {p: m for (p, c, test), m in moments.items() if c == context and not test and p != CONTROL}
    background = None
    if trained:
        background = add_up(list(trained.values()))
    return ContextTruth(
        control=control,
        control_test=None if held_out is None else held_out.mean,
        perturbed_mean=_perturbed_mean(context, moments),
        control_rows=rows[CONTROL, context, False],
        reference_rows=rows.get((CONTROL, context, True), rows[CONTROL, context, False]),
        background=background,
        own=trained,
    )


def _perturbed_mean(context: str, moments: Mapping[Group, Moments]) -> np.ndarray | None:
    """Mean over the context's training perturbations, or its control plus the mean effect in the other contexts."""
    trained = [(p, c) for p, c, test in moments if not test and p != CONTROL]
    inside = [moments[p, c, False].mean for p, c in trained if c == context]
    if inside:
        return np.mean(inside, axis=0)
    effects = [
        moments[p, c, False].mean - moments[CONTROL, c, False].mean
        for p, c in trained
        if (CONTROL, c, False) in moments
    ]
    if not effects:
        return None
    return moments[CONTROL, context, False].mean + np.mean(effects, axis=0)
