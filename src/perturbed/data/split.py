"""The stage `split`: which cells train, validate and test, drawn once and frozen.

Every draw has its own stream, seeded by the split's seed, the fold and a name, and every set is sorted by name before
it is drawn from; so a split depends neither on the order of cells nor on what else is in the data.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import (
    Context,
    FromColumn,
    FromFile,
    HeldoutCells,
    RandomCells,
    SplitSpec,
    UnseenCombo,
    UnseenSingle,
)
from perturbed.data.contracts import PARTS, Split
from perturbed.data.given_splits import parts_of_column, parts_of_file
from perturbed.errors import DataError, suggest
from perturbed.names import CONTROL, genes_of

log = logging.getLogger(__name__)

_ByCondition = HeldoutCells | UnseenSingle | UnseenCombo | Context


def make_split(obs: pd.DataFrame, spec: SplitSpec, fold: int = 0, *, dataset: str = "", name: str = "") -> Split:
    """Draw one fold of a split.

    Control cells: `control_test_fraction` of them, in each context in which a perturbation is tested, are kept from
    training; at least one stays. With a fraction of 0.5, folds 2j and 2j+1 use complementary halves, so that an average
    over an even number of folds weighs all controls equally. Validation cells are `val_fraction` of each training
    condition (perturbation × context), at least one cell of which stays in training; their draw is the same in every
    fold. The kinds `from_column` and `from_file` take all parts from the source and draw nothing; `random_cells` draws
    cells, controls among them, and tests no perturbation as such.

    Parameters
    ----------
    obs
        Index: cell; columns `perturbation` (canonical), `context`, and the column that `from_column` names.
    spec
        The split's section of the configuration.
    fold
        Which fold, from 0.
    dataset, name
        Names for the header.

    Returns
    -------
    Split
        Every cell of `obs`, in its order.

    Raises
    ------
    DataError
        If nothing is left to test or to train on, or names in `spec` do not occur; with the counts.
    """
    if not 0 <= fold < spec.n_folds:
        raise DataError(f"split {name!r}: fold {fold} does not exist; it has {spec.n_folds}, from 0")
    cells = pd.DataFrame(
        {key: obs[key].astype(str).to_numpy(dtype=object) for key in ("perturbation", "context")},
        index=pd.Index(obs.index.astype(str), name="cell"),
    )
    if not cells.index.is_unique:
        raise DataError(f"split {name!r}: cell {cells.index[cells.index.duplicated()][0]!r} occurs twice; rename one")
    where = f"split {name!r} ({spec.kind}, fold {fold})"
    if isinstance(spec, FromColumn):
        cells["part"] = parts_of_column(obs, spec, where)
    elif isinstance(spec, FromFile):
        cells["part"] = parts_of_file(cells, spec, fold, dataset, where)
    elif isinstance(spec, RandomCells):
        cells["part"] = _draw_cells(cells.sort_index(), spec, where).reindex(cells.index)
    else:
        cells = cells.sort_index()  # draws must not depend on the order of the rows
        cells["part"] = _ASSIGN[type(spec)](cells, spec, fold, where)
        _draw_controls(cells, spec, fold)
        _draw_validation(cells, spec)
        _cap_training(cells, spec)
        cells = cells.reindex(obs.index.astype(str))
    cells["subgroup"] = subgroups(cells)
    _check_parts(cells, where, needs_test=not isinstance(spec, RandomCells))
    header = {"dataset": dataset, "split": name, "fold": fold, "seed": spec.seed}
    header["spec"] = spec.model_dump(mode="json", exclude={"methods", "datasets"})
    split = Split(cells[["perturbation", "part", "subgroup"]].rename_axis("cell"), header)
    log.info("%s\n%s", where, count_parts(split).to_string())
    return split


def count_parts(split: Split) -> pd.DataFrame:
    """Cells and perturbations of each part and subgroup; controls stand as `control`, what trains as `perturbed`."""
    table = split.table
    group = np.where(table["subgroup"] == "", "perturbed", table["subgroup"])
    group = np.where(table["perturbation"] == CONTROL, CONTROL, group)
    part = pd.Categorical(table["part"], categories=list(PARTS), ordered=True)
    long = pd.DataFrame({"part": part, "subgroup": group, "perturbation": table["perturbation"].to_numpy()})
    counts = long.groupby(["part", "subgroup"], observed=True)
    return counts.agg(n_cells=("perturbation", "size"), n_perturbations=("perturbation", "nunique"))


# --- draws --------------------------------------------------------------------------------------------------------


def _stream(*keys: object) -> np.random.Generator:
    """A generator seeded by the sha256 of its keys; Python's own hash changes between processes."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _shuffle(names: Iterable[str], *keys: object) -> list[str]:
    """Names in random order, whatever order they come in."""
    ordered = sorted(names)
    return [ordered[i] for i in _stream(*keys).permutation(len(ordered))]


def _share(n: int, fraction: float) -> int:
    """`fraction` of n, rounded half up."""
    return int(np.floor(n * fraction + 0.5))


def _fold_of(names: Iterable[str], spec: UnseenSingle | UnseenCombo, fold: int, what: str, where: str) -> set[str]:
    """The names that k-fold tests in this fold; sizes differ by at most one."""
    order = _shuffle(names, spec.seed, what)
    if len(order) < spec.n_folds:
        raise DataError(f"{where}: {len(order)} {what} are too few for {spec.n_folds} folds; lower `folds`")
    return set(np.array_split(np.array(order, dtype=object), spec.n_folds)[fold])


# --- kinds: the part of each cell, controls and validation still undrawn --------------------------------------------


def _n_genes(cells: pd.DataFrame) -> np.ndarray:
    sizes = {name: len(genes_of(name)) for name in cells["perturbation"].unique()}
    return cells["perturbation"].map(sizes).to_numpy()


def _names(cells: pd.DataFrame, mask: np.ndarray) -> list[str]:
    return sorted(cells.loc[mask, "perturbation"].unique())


def _assign_heldout_cells(cells: pd.DataFrame, spec: HeldoutCells, fold: int, where: str) -> np.ndarray:
    """Cells of some singles; combinations are not used, as in the paper."""
    sizes = cells.loc[_n_genes(cells) == 1, "perturbation"].value_counts()
    if spec.perturbations is not None:
        chosen = list(spec.perturbations)
        for name in chosen:
            if name not in sizes.index:
                raise DataError(f"{where}: no single perturbation {name!r}; {suggest(name, sizes.index)}")
            if sizes[name] <= spec.n_cells:
                raise DataError(
                    f"{where}: {name!r} has {sizes[name]} cells, so holding out {spec.n_cells} leaves none to train "
                    "on; lower `n_cells` or drop it from `perturbations`"
                )
    else:
        fit = sizes.index[(sizes > spec.min_cells) & (sizes > spec.n_cells)]
        if len(fit) < spec.n_perturbations:
            raise DataError(
                f"{where}: {len(fit)} of {len(sizes)} single perturbations have more than {spec.min_cells} cells (and "
                f"more than `n_cells` {spec.n_cells}), {spec.n_perturbations} are wanted; lower `min_cells` or "
                f"`n_perturbations` (the largest has {sizes.max() if len(sizes) else 0} cells)"
            )
        chosen = _shuffle(fit, spec.seed, fold, "perturbations")[: spec.n_perturbations]
    part = np.where(_n_genes(cells) > 1, "unused", "train").astype(object)
    for name in chosen:
        held = _shuffle(cells.index[cells["perturbation"] == name], spec.seed, fold, name)[: spec.n_cells]
        part[cells.index.get_indexer(pd.Index(held))] = "test"
    return part


def _assign_unseen_single(cells: pd.DataFrame, spec: UnseenSingle, fold: int, where: str) -> np.ndarray:
    """Singles of held-out genes; combinations that hold one of these genes are not used."""
    singles = _names(cells, _n_genes(cells) == 1)
    if spec.folds > 1:
        held = _fold_of(singles, spec, fold, "single perturbations", where)
    else:
        held = set(_shuffle(singles, spec.seed, "single perturbations")[: _share(len(singles), spec.test_fraction)])
    part = dict.fromkeys(cells["perturbation"].unique(), "train")
    for name in part:
        if held & set(genes_of(name)):
            part[name] = "test" if name in held else "unused"
    return cells["perturbation"].map(part).to_numpy(dtype=object)


def _assign_unseen_combo(cells: pd.DataFrame, spec: UnseenCombo, fold: int, where: str) -> np.ndarray:
    """Combinations, by one of three schemes."""
    combos = _names(cells, _n_genes(cells) > 1)
    if spec.scheme == "kfold":
        tested = _fold_of(combos, spec, fold, "combinations", where)
    elif spec.scheme == "random":
        order = _shuffle(combos, spec.seed, fold, "combinations")
        tested = set(order[_share(len(combos), spec.train_fraction) :])
    else:
        tested = _hold_out_genes(cells, combos, spec, fold)
    return np.where(cells["perturbation"].isin(tested), "test", "train").astype(object)


def _hold_out_genes(cells: pd.DataFrame, combos: Sequence[str], spec: UnseenCombo, fold: int) -> set[str]:
    """GEARS' scheme: genes are held out with everything that holds them, and of the rest a share of combinations."""
    genes = {gene for name in cells["perturbation"].unique() for gene in genes_of(name)}
    held = set(_shuffle(genes, spec.seed, fold, "genes")[: _share(len(genes), spec.test_gene_fraction)])
    tested = {name for name in cells["perturbation"].unique() if held & set(genes_of(name))}
    order = _shuffle(set(combos) - tested, spec.seed, fold, "combinations")
    return tested | set(order[: _share(len(order), spec.test_gene_fraction)])


def _assign_context(cells: pd.DataFrame, spec: Context, fold: int, where: str) -> np.ndarray:
    """Perturbed cells of one context; those perturbed nowhere else cannot be transferred and are not used."""
    context = spec.contexts[fold]
    there = (cells["context"] == context).to_numpy()
    if not there.any():
        raise DataError(f"{where}: no cell has context {context!r}; {suggest(context, cells['context'].unique())}")
    perturbed = (cells["perturbation"] != CONTROL).to_numpy()
    elsewhere = cells["perturbation"].isin(cells.loc[~there, "perturbation"].unique()).to_numpy()
    part = np.full(len(cells), "train", dtype=object)
    part[there & perturbed & elsewhere] = "test"
    part[there & perturbed & ~elsewhere] = "unused"
    return part


_ASSIGN: dict[type, Callable[[pd.DataFrame, Any, int, str], np.ndarray]] = {
    HeldoutCells: _assign_heldout_cells,
    UnseenSingle: _assign_unseen_single,
    UnseenCombo: _assign_unseen_combo,
    Context: _assign_context,
}


def _draw_cells(cells: pd.DataFrame, spec: RandomCells, where: str) -> pd.Series:
    """Part of each cell, drawn whatever its condition; the shares are of the cells that are used."""
    part = pd.Series("train", index=cells.index, dtype=object)
    for name, share in sorted(spec.keep.items()):
        own = cells.index[cells["perturbation"] == name]
        if own.empty:
            raise DataError(f"{where}: keep: no perturbation {name!r}; {suggest(name, cells['perturbation'].unique())}")
        part[_shuffle(own, spec.seed, "keep", name)[_share(len(own), share) :]] = "unused"
    used = cells[part == "train"]
    strata = used["perturbation"] + "|" + used["context"] if spec.stratified else pd.Series("all", index=used.index)
    for stratum, members in used.groupby(strata, sort=True).groups.items():
        order = _shuffle(members, spec.seed, "cells", stratum)
        n_test = min(_share(len(order), spec.test_fraction), len(order) - 1)
        n_val = min(_share(len(order), spec.val_fraction), len(order) - 1 - n_test)
        part[order[:n_test]] = "test"
        part[order[n_test : n_test + n_val]] = "val"
    # no subgroup stands for a combination that trains, so its cells are not tested
    part[(_n_genes(cells) > 1) & (part == "test").to_numpy()] = "unused"
    return part


# --- controls, validation, subgroups --------------------------------------------------------------------------------


def _draw_controls(cells: pd.DataFrame, spec: _ByCondition, fold: int) -> None:
    """Move test controls out of training, in the contexts that are tested."""
    tested = cells.loc[cells["part"] == "test", "context"].unique()
    for context in sorted(tested):
        names = cells.index[(cells["perturbation"] == CONTROL) & (cells["context"] == context)]
        order = _shuffle(names, spec.seed, fold // 2 if spec.control_test_fraction == 0.5 else fold, CONTROL, context)
        if spec.control_test_fraction == 0.5:
            half = len(order) // 2
            held = order[half:] if fold % 2 else order[:half]
        else:
            held = order[: _share(len(order), spec.control_test_fraction)]
        cells.loc[held[: max(0, len(order) - 1)], "part"] = "test"


def _draw_validation(cells: pd.DataFrame, spec: _ByCondition) -> None:
    """Move a share of every training condition to validation; a condition's only cell trains."""
    train = cells[cells["part"] == "train"]
    conditions = train["perturbation"] + "|" + train["context"]
    for condition, members in train.groupby(conditions, sort=True).groups.items():
        n_val = min(_share(len(members), spec.val_fraction), len(members) - 1)
        order = _shuffle(members, spec.seed, "val", condition)
        cells.loc[order[:n_val], "part"] = "val"


def _cap_training(cells: pd.DataFrame, spec: _ByCondition) -> None:
    """Move training cells beyond the caps to the unused ones; one order per condition makes smaller caps nested."""
    train = cells[cells["part"] == "train"]
    conditions = train["perturbation"] + "|" + train["context"]
    for condition, members in train.groupby(conditions, sort=True).groups.items():
        is_control = train.loc[members[0], "perturbation"] == CONTROL
        cap = spec.train_controls if is_control else spec.train_cells
        if cap is not None:
            cells.loc[_shuffle(members, spec.seed, "cap", condition)[cap:], "part"] = "unused"


def subgroups(cells: pd.DataFrame) -> np.ndarray:
    """Subgroup of each cell, from what training holds; empty for controls and for cells that are not tested.

    A test perturbation that trains in the same context is `single_seen_heldout_cells`; one that trains in other
    contexts only, `context`; another single, `single_unseen`. A combination is `combo_seenN` by the number N of its
    genes that are perturbed in any training cell, alone or combined, and at most 2 (with three genes too).

    Parameters
    ----------
    cells
        Columns `perturbation`, `context` and `part`.
    """
    train = cells[cells["part"] == "train"]
    seen = set(train["perturbation"])
    seen_here = set(zip(train["perturbation"], train["context"]))
    genes = {gene for name in seen for gene in genes_of(name)}

    def subgroup(name: str, context: str) -> str:
        if len(genes_of(name)) == 1 and (name, context) in seen_here:
            return "single_seen_heldout_cells"
        if name in seen and (name, context) not in seen_here:
            return "context"
        if len(genes_of(name)) == 1:
            return "single_unseen"
        return f"combo_seen{min(2, len(genes & set(genes_of(name))))}"

    tested = (cells["part"] == "test").to_numpy() & (cells["perturbation"] != CONTROL).to_numpy()
    pairs = list(zip(cells["perturbation"], cells["context"]))
    known = {pair: subgroup(*pair) for pair in {pair for pair, is_tested in zip(pairs, tested) if is_tested}}
    return np.array([known[pair] if is_tested else "" for pair, is_tested in zip(pairs, tested)], dtype=object)


def _check_parts(cells: pd.DataFrame, where: str, *, needs_test: bool) -> None:
    perturbed = cells["perturbation"] != CONTROL
    sizes = _n_genes(cells)
    counts = ", ".join(
        f"{cells.loc[mask, 'perturbation'].nunique()} {what}"
        for what, mask in (("singles", sizes == 1), ("combinations", sizes > 1))
    )
    counts += f", {int((~perturbed).sum())} control cells"
    for part, mask in (("test", perturbed), ("train", perturbed | True)):
        if (needs_test or part == "train") and not ((cells["part"] == part) & mask).any():
            what = "perturbed cell to test" if part == "test" else "cell to train on"
            raise DataError(
                f"{where}: leaves no {what} (the data hold {counts}); choose another kind, or loosen its fractions"
            )
    if not ((cells["part"] == "train") & ~perturbed).any():
        raise DataError(f"{where}: leaves no control cell to train on ({counts}); lower `control_test_fraction`")
