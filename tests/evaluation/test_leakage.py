from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_world import FEATURES, make_counts, make_fold, make_prepared
from perturbed.config import Context, FeatureSpec, HeldoutCells, UnseenCombo, UnseenSingle
from perturbed.data import features as features_module
from perturbed.data.contracts import Features, Split, open_prepared, read_features, read_prepared, read_split
from perturbed.data.features import compute_features
from perturbed.data.matrices import column_moments
from perturbed.errors import LeakageError
from perturbed.evaluation.leakage import CHECKS, check_leakage, core_name

SPECS = {
    "zero_shot": UnseenCombo(kind="unseen_combo"),
    "half": UnseenCombo(kind="unseen_combo", train_fraction=0.5),
    "gears": UnseenCombo(kind="unseen_combo", scheme="gears"),
    "unseen_single": UnseenSingle(kind="unseen_single", folds=3),
    "heldout_cells": HeldoutCells(kind="heldout_cells", n_perturbations=2, n_cells=5, min_cells=6),
    "context": Context(kind="context", contexts=("T",)),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leakage")
    return make_prepared(folder, make_counts(contexts=("T", "B"), n_genes=60), keys={"context": "context"})


@pytest.fixture
def fold(prepared, tmp_path):
    split, features = make_fold(tmp_path, prepared)
    return open_prepared(prepared), read_split(split), read_features(features)


def relabel(split: Split, cells, **columns) -> Split:
    table = split.table.copy()
    for column, value in columns.items():
        table.loc[cells, column] = value
    return Split(table, split.header)


def retrained(prepared, split, spec=FEATURES) -> Features:
    """Honest features of a split, so that only the split's own leak can be found."""
    return compute_features(prepared, split, spec)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("spec", [FEATURES, FeatureSpec(n_hvg="all", n_pcs=30)])
def test_honest_splits_pass(prepared, tmp_path, name, spec):
    split, features = make_fold(tmp_path, prepared, SPECS[name], spec)
    result = check_leakage(open_prepared(prepared), read_split(split), read_features(features))
    assert result["split_sha256"] == read_split(split).header["sha256"]
    assert [check["name"] for check in result["checks"]] == list(CHECKS)
    assert all(check["ok"] and check["detail"] for check in result["checks"]) and result["upstream"] is False


@pytest.mark.parametrize(
    ("one", "other"),
    [("A+B", "B+A"), ("A+ctrl", "A"), ("ctrl+A", "A"), ("A+A", "A"), ("NT", "control"), ("A+NegCtrl+B", "A+B")],
)
def test_spellings_are_one(one, other):
    assert core_name(one) == core_name(other)


def test_a_gene_named_ctrl_is_a_gene():
    assert core_name("CTRL") == "CTRL"


# --- leaks of the split -----------------------------------------------------------------------------------------------


def test_test_perturbation_in_training(fold):
    prepared, split, _ = fold
    cells = split.table.query("perturbation == 'A+B'").index[:3]
    leaky = relabel(split, cells, part="train", subgroup="")
    with pytest.raises(LeakageError, match=r"unseen perturbations: A\+B \(in training as A\+B\)"):
        check_leakage(prepared, leaky, retrained(prepared, leaky))


def test_test_perturbation_in_validation(fold):
    prepared, split, features = fold
    cells = split.table.query("perturbation == 'A+B'").index[:3]
    with pytest.raises(LeakageError, match=r"unseen perturbations: A\+B"):
        check_leakage(prepared, relabel(split, cells, part="val", subgroup=""), features)


@pytest.mark.parametrize("spelling", ["B+A", "A+ctrl+B", "A+B+B"])
def test_other_spellings_in_training(fold, spelling):
    prepared, split, _ = fold
    cells = split.table.query("perturbation == 'A+B'").index[:3]
    leaky = relabel(split, cells, part="train", subgroup="", perturbation=spelling)
    with pytest.raises(LeakageError) as error:
        check_leakage(prepared, leaky, retrained(prepared, leaky))
    message = str(error.value)
    assert f"unseen perturbations: A+B (in training as {spelling})" in message and "\n" not in message
    assert f"labels canonical: {spelling} (canonical: A+B)" in message
    assert f"labels agree: {spelling} (prepared: A+B)" in message


def test_single_spelt_with_a_filler(prepared, tmp_path):
    split, _ = make_fold(tmp_path, prepared, SPECS["unseen_single"])
    split, adata = read_split(split), open_prepared(prepared)
    held = split.table.query("subgroup == 'single_unseen'")["perturbation"].iloc[0]
    cells = split.table.query("perturbation == @held").index[:2]
    leaky = relabel(split, cells, part="train", subgroup="", perturbation=f"{held}+ctrl")
    with pytest.raises(LeakageError, match=rf"unseen perturbations: {held} \(in training as {held}\+ctrl\)"):
        check_leakage(adata, leaky, retrained(adata, leaky))


def test_gene_of_an_unseen_single_in_a_training_combination(prepared, tmp_path):
    split, _ = make_fold(tmp_path, prepared, SPECS["unseen_single"])
    split, adata = read_split(split), open_prepared(prepared)
    unused = split.table.query("part == 'unused'")["perturbation"].iloc[0]
    leaky = relabel(split, split.table.index[split.table["perturbation"] == unused], part="train")
    with pytest.raises(LeakageError, match=rf"unseen genes: [A-F] \(in {unused[0]}\+{unused[2]}\)"):
        check_leakage(adata, leaky, retrained(adata, leaky))


def test_context_already_in_training(prepared, tmp_path):
    split, _ = make_fold(tmp_path, prepared, SPECS["context"])
    split, adata = read_split(split), open_prepared(prepared)
    cells = split.table.query("perturbation == 'C' and part == 'test'").index[:2]
    leaky = relabel(split, cells, part="train", subgroup="")
    with pytest.raises(LeakageError, match=r"transferred perturbations: C in T"):
        check_leakage(adata, leaky, retrained(adata, leaky))


def test_cell_in_two_parts(fold):
    prepared, split, features = fold
    cell = split.cells("test")[0]
    twice = pd.concat([split.table, split.table.loc[[cell]].assign(part="train", subgroup="")])
    with pytest.raises(LeakageError, match=rf"one part per cell: {cell}"):
        check_leakage(prepared, Split(twice, split.header), features)


def test_cells_that_do_not_match(fold):
    prepared, split, features = fold
    table = split.table.rename(index={split.cells("test")[0]: "stranger"})
    with pytest.raises(LeakageError, match=r"cells known: stranger \(not in the prepared data\), .* \(in no part\)"):
        check_leakage(prepared, Split(table, split.header), features)


def test_wrong_subgroup(fold):
    prepared, split, features = fold
    wrong = relabel(split, split.table.query("subgroup == 'combo_seen2'").index, subgroup="combo_seen0")
    with pytest.raises(LeakageError, match=r"subgroups true: .*\(combo_seen0, by training combo_seen2\)"):
        check_leakage(prepared, wrong, features)


# --- leaks of the features --------------------------------------------------------------------------------------------


def test_features_of_another_split(fold):
    prepared, split, features = fold
    other = Features(features.table, {**features.header, "split_sha256": "0" * 64})
    with pytest.raises(LeakageError, match=r"features of this split: features are of split 000000000000"):
        check_leakage(prepared, split, other)


def with_cells(prepared, split, monkeypatch, leak: str) -> Features:
    """Features with one of the two planted leaks, or with one test control cell among the training cells."""
    everything = read_prepared(prepared.X.group.file.filename).X
    choose, fit = features_module.choose_genes, features_module.fit_pca
    with monkeypatch.context() as patch:
        if leak == "genes":
            patch.setattr(features_module, "choose_genes", lambda train, *rest: choose(everything, *rest))
        if leak == "pca":

            def fit_all(values, mean, *rest):
                chosen = choose(train_of(prepared, split), prepared.var, FEATURES, set("ABCDEF"))
                cells = everything[:, chosen]
                return fit(cells, column_moments(cells)[0], *rest)

            patch.setattr(features_module, "fit_pca", fit_all)
        if leak == "control":
            rows, cell = features_module.training_rows, split.table.query("part == 'test'").index
            control = cell[split.table.loc[cell, "perturbation"] == "control"][0]
            more = prepared.obs_names.get_loc(control)
            patch.setattr(features_module, "training_rows", lambda *args: np.sort([*rows(*args)[1:], more]))
        return compute_features(prepared, split, FEATURES)


def train_of(prepared, split):
    return features_module.read_rows(prepared.X, features_module.training_rows(prepared, split))


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        ("genes", "features recomputed: gene .* not chosen by training cells"),
        ("pca", "features recomputed: pc1 of .* is not that of the training cells"),
        ("control", "features recomputed: (mean|gene) .*"),
    ],
)
def test_planted_leaks_are_found(fold, monkeypatch, leak, message):
    prepared, split, honest = fold
    leaky = with_cells(prepared, split, monkeypatch, leak)
    header = {**honest.header}
    with pytest.raises(LeakageError, match=message):
        check_leakage(prepared, split, Features(leaky.table, header))


def test_header_that_counts_other_cells(fold):
    prepared, split, features = fold
    other = Features(features.table, {**features.header, "n_cells": features.header["n_cells"] + 1})
    with pytest.raises(LeakageError, match=r"features' cells: .* cells, training has"):
        check_leakage(prepared, split, other)


def test_upstream_genes_are_told(tmp_path):
    prepared = make_prepared(tmp_path, prepare={"upstream_genes": True})
    split, features = make_fold(tmp_path, prepared)
    assert check_leakage(read_prepared(prepared), read_split(split), read_features(features))["upstream"] is True
