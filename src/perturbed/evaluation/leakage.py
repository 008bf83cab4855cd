"""The proof that nothing of the test cells reaches training, whose output every fit needs.

It trusts neither the split nor the features it is given: labels are compared in a spelling that merges gene order and
placeholders, and genes, scaling and PCA are computed anew from the training cells alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.config import FeatureSpec, parse
from perturbed.data.contracts import Features, Split
from perturbed.data.features import compute_features
from perturbed.errors import LeakageError, PerturbedError
from perturbed.names import CONTROL, JOINER, genes_of, join_genes

if TYPE_CHECKING:
    from anndata import AnnData

PLACEHOLDERS = frozenset(
    {"", "ctrl", "control", "Control", "NegCtrl", "negctrl", "non-targeting", "Non-Targeting", "nontargeting", "NT"}
)
"""Parts of a label that stand for no gene in one source or another. `CTRL` is a gene and no placeholder."""


@dataclass(frozen=True)
class _Inputs:
    prepared: AnnData
    split: Split
    features: Features
    table: pd.DataFrame
    """The split's table with `context` and `core`, the label's spelling that merges order and placeholders."""

    def part(self, *names: str) -> pd.DataFrame:
        """Perturbed cells of some parts."""
        rows = self.table["part"].isin(names) & (self.table["core"] != CONTROL)
        return self.table[rows]


def check_leakage(prepared: AnnData, split: Split, features: Features) -> dict[str, Any]:
    """Prove that training sees nothing of the test cells.

    Parameters
    ----------
    prepared
        The prepared data; may be backed, and then only rows of training cells are read from it.
    split
        The frozen split.
    features
        Its features, which are computed anew from training cells and must be equal: the genes exactly, scaling and PCA
        to the digits that the file holds.

    Returns
    -------
    dict
        The content of `leakage.json`: `split_sha256`, `features_sha256`, `upstream` (whether the source chose its genes
        on all cells, which no check can undo) and `checks`, each with `name`, `ok` and `detail`.

    Raises
    ------
    LeakageError
        One line with every check that fails and the names that offend.
    """
    table = split.table.copy()
    table["context"] = prepared.obs["context"].astype(str).reindex(table.index).fillna("")
    table["core"] = table["perturbation"].map({label: core_name(label) for label in table["perturbation"].unique()})
    inputs = _Inputs(prepared, split, features, table)
    checks = []
    for name, check in CHECKS.items():
        try:
            detail, offenders = check(inputs)
        except PerturbedError as error:  # a check that cannot run proves nothing
            detail, offenders = str(error), ["cannot be checked"]
        checks.append({"name": name, "ok": not offenders, "detail": _list(offenders) if offenders else detail})
    failed = [f"{check['name']}: {check['detail']}" for check in checks if not check["ok"]]
    if failed:
        header = split.header
        where = f"{header.get('dataset', '')}/{header.get('split', '')}/fold{header.get('fold', '')}"
        raise LeakageError(
            f"leakage in {where}: {'; '.join(failed)}; remake split.csv and features.csv from these data"
        )
    return {
        "split_sha256": split.header.get("sha256"),
        "features_sha256": features.header.get("sha256"),
        "upstream": bool(features.header.get("upstream", False)),
        "checks": checks,
    }


def core_name(label: str) -> str:
    """A label's genes without placeholders, order or repeats: `A+ctrl`, `ctrl+A` and `A` are one.

    >>> core_name("ctrl+KLF1")
    'KLF1'
    >>> core_name("KLF1+BAK1") == core_name("BAK1+KLF1")
    True
    """
    return join_genes(part for part in str(label).split(JOINER) if part.strip() not in PLACEHOLDERS)


def _list(names: Iterable[str], n_shown: int = 5) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - n_shown} more" if len(unique) > n_shown else ""
    return ", ".join(unique[:n_shown]) + more


Finding = tuple[str, list[str]]
"""What was looked at, and who offends."""


# --- cells and labels -----------------------------------------------------------------------------------------------


def _check_one_part(inputs: _Inputs) -> Finding:
    index = inputs.table.index
    return f"{len(index)} cells, each in one row", list(index[index.duplicated()].unique())


def _check_known_cells(inputs: _Inputs) -> Finding:
    known = pd.Index(inputs.prepared.obs_names)
    strange = inputs.table.index.difference(known)
    absent = known.difference(inputs.table.index)
    offenders = [f"{cell} (not in the prepared data)" for cell in strange]
    return "the split names exactly the prepared cells", [*offenders, *(f"{cell} (in no part)" for cell in absent)]


def _check_labels(inputs: _Inputs) -> Finding:
    table = inputs.table[~inputs.table.index.duplicated()]
    ours = inputs.prepared.obs["perturbation"].astype(str).reindex(table.index)
    differ = (ours != table["perturbation"]) & ours.notna()
    pairs = table.loc[differ, "perturbation"] + " (prepared: " + ours[differ] + ")"
    return "labels equal those of the prepared data", list(pairs.unique())


def _check_canonical(inputs: _Inputs) -> Finding:
    labels = inputs.table["perturbation"].unique()
    wrong = [f"{label} (canonical: {core_name(label)})" for label in labels if label != core_name(label)]
    return f"{len(labels)} labels, all canonical", wrong


def _check_subgroups(inputs: _Inputs) -> Finding:
    """Subgroups say what they claim of training."""
    from perturbed.data.split import subgroups

    expected = subgroups(inputs.table.assign(perturbation=inputs.table["core"]))
    wrong = inputs.table["subgroup"].to_numpy() != expected
    names = [
        f"{name} ({given or 'none'}, by training {true or 'none'})"
        for name, given, true in zip(inputs.table["core"][wrong], inputs.table["subgroup"][wrong], expected[wrong])
    ]
    return "subgroups agree with what training holds", names


# --- perturbations ----------------------------------------------------------------------------------------------------


def _check_perturbations(inputs: _Inputs) -> Finding:
    """Unseen perturbations are in no training or validation cell, under any spelling."""
    test, fit = inputs.part("test"), inputs.part("train", "val")
    seen = set(fit["core"])
    unseen = test[~test["subgroup"].isin(["single_seen_heldout_cells", "context"])]
    names = sorted(set(unseen["core"]))
    spelt = fit.groupby("core")["perturbation"].unique()
    offenders = [f"{name} (in training as {', '.join(spelt[name])})" for name in names if name in seen]
    return f"{len(names)} unseen perturbations, none in training or validation", offenders


def _check_contexts(inputs: _Inputs) -> Finding:
    """Perturbations tested by transfer are in training in other contexts only."""
    test, fit = inputs.part("test"), inputs.part("train", "val")
    pairs = set(zip(fit["core"], fit["context"]))
    moved = test[test["subgroup"] == "context"]
    names = sorted(set(zip(moved["core"], moved["context"])))
    offenders = [f"{name} in {context}" for name, context in names if (name, context) in pairs]
    return f"{len(names)} perturbation-context pairs, none in training or validation", offenders


def _check_genes(inputs: _Inputs) -> Finding:
    """Genes of unseen singles are perturbed in no training combination either."""
    test, fit = inputs.part("test"), inputs.part("train", "val")
    singles = set(test.loc[test["subgroup"] == "single_unseen", "core"])
    combos = {name for name in fit["core"].unique() if len(genes_of(name)) > 1}
    offenders = [f"{gene} (in {name})" for name in sorted(combos) for gene in genes_of(name) if gene in singles]
    return f"genes of {len(singles)} unseen singles, none in a training combination", offenders


# --- features ---------------------------------------------------------------------------------------------------------


def _check_hash(inputs: _Inputs) -> Finding:
    given, own = inputs.features.header.get("split_sha256"), inputs.split.header.get("sha256")
    return "the features name this split", [] if given == own else [f"features are of split {str(given)[:12]}"]


def _check_n_cells(inputs: _Inputs) -> Finding:
    given, own = inputs.features.header.get("n_cells"), len(inputs.split.cells("train"))
    return f"the features are of {own} cells", [] if given == own else [f"{given} cells, training has {own}"]


def _check_features(inputs: _Inputs) -> Finding:
    """Genes, scaling and PCA, computed anew from the training cells alone."""
    given = inputs.features
    spec = parse(FeatureSpec, given.header.get("spec", {}), "features.csv: spec")
    fresh = compute_features(inputs.prepared, inputs.split, spec)
    if set(given.genes) != set(fresh.genes):
        extra, lost = given.genes.difference(fresh.genes), fresh.genes.difference(given.genes)
        return "", [*(f"gene {gene} not chosen by training cells" for gene in extra), *(f"{g} missing" for g in lost)]
    table, columns = given.table.reindex(fresh.genes), list(fresh.table.columns)
    if list(given.table.columns) != columns:
        return "", [f"{len(given.table.columns)} columns, training cells give {len(columns)}"]
    tolerance = {"mean": (1e-7, 1e-9), "sd": (1e-7, 1e-9)}
    offenders = []
    for column in columns:
        rtol, atol = tolerance.get(column, (0.0, 1e-6))
        near = np.isclose(table[column].to_numpy(), fresh.table[column].to_numpy(), rtol=rtol, atol=atol)
        if not near.all():
            offenders.append(f"{column} of {fresh.genes[~near][0]} is not that of the training cells")
    return f"{len(fresh.genes)} genes, scaling and {len(columns) - 2} components equal on training cells", offenders


CHECKS: dict[str, Callable[[_Inputs], Finding]] = {
    "one part per cell": _check_one_part,
    "cells known": _check_known_cells,
    "labels agree": _check_labels,
    "labels canonical": _check_canonical,
    "unseen perturbations": _check_perturbations,
    "transferred perturbations": _check_contexts,
    "unseen genes": _check_genes,
    "subgroups true": _check_subgroups,
    "features of this split": _check_hash,
    "features' cells": _check_n_cells,
    "features recomputed": _check_features,
}
"""Every check by name; each returns what it looked at and who offends."""
