from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_world import DOUBLES, SINGLES
from perturbed.config import Context, FromColumn, FromFile, HeldoutCells, UnseenCombo, UnseenSingle
from perturbed.data.contracts import read_h5ad, read_split, write_split
from perturbed.data.split import count_parts, make_split
from perturbed.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def make_obs(n_cells=10, n_control=41, contexts=("all",), conditions=(*SINGLES, *DOUBLES), seed=0) -> pd.DataFrame:
    rows = [("control", c) for c in contexts for _ in range(n_control)]
    rows += [(p, c) for c in contexts for p in conditions for _ in range(n_cells)]
    obs = pd.DataFrame(rows, columns=["perturbation", "context"], index=[f"c{i:04d}" for i in range(len(rows))])
    return obs.sample(frac=1, random_state=seed)


def combo(**keys):
    return UnseenCombo(kind="unseen_combo", **keys)


SPECS = {
    "heldout_cells": HeldoutCells(kind="heldout_cells", n_perturbations=3, n_cells=4, min_cells=5),
    "heldout_named": HeldoutCells(kind="heldout_cells", perturbations=("B", "F"), n_cells=9),
    "unseen_single": UnseenSingle(kind="unseen_single", folds=3),
    "unseen_single_once": UnseenSingle(kind="unseen_single", folds=1, test_fraction=0.5),
    "zero_shot": combo(folds=2),
    "half": combo(folds=2, train_fraction=0.5),
    "kfold": combo(folds=5, scheme="kfold"),
    "gears": combo(folds=3, scheme="gears"),
    "context": Context(kind="context", contexts=("T", "B")),
}


def fold_of(name, fold=0, obs=None):
    if obs is None:
        obs = make_obs(contexts=("T", "B") if name == "context" else ("all",))
    return make_split(obs, SPECS[name], fold, dataset="world", name=name)


def slow_subgroups(table: pd.DataFrame) -> list[str]:
    """The definition, cell by cell."""
    train = table[table["part"] == "train"]
    seen_genes = {g for p in train["perturbation"] if p != "control" for g in p.split("+")}
    result = []
    for _, row in table.iterrows():
        p, genes = row["perturbation"], row["perturbation"].split("+")
        mine = train[train["perturbation"] == p]
        if row["part"] != "test" or p == "control":
            result.append("")
        elif len(genes) == 1 and (mine["context"] == row["context"]).any():
            result.append("single_seen_heldout_cells")
        elif len(mine) and not (mine["context"] == row["context"]).any():
            result.append("context")
        elif len(genes) == 1:
            result.append("single_unseen")
        else:
            result.append(f"combo_seen{min(2, sum(g in seen_genes for g in genes))}")
    return result


@pytest.mark.parametrize("name", SPECS)
def test_order_of_rows_does_not_matter(name):
    contexts = ("T", "B") if name == "context" else ("all",)
    for fold in range(SPECS[name].n_folds):
        first = fold_of(name, fold, make_obs(contexts=contexts, seed=1))
        other = fold_of(name, fold, make_obs(contexts=contexts, seed=2))
        assert not first.table.index.equals(other.table.index)
        pd.testing.assert_frame_equal(first.table.sort_index(), other.table.sort_index())
        assert first.header == other.header


@pytest.mark.parametrize("name", SPECS)
def test_subgroups_and_parts_against_a_slow_reference(name):
    contexts = ("T", "B") if name == "context" else ("all",)
    obs = make_obs(contexts=contexts)
    for fold in range(SPECS[name].n_folds):
        table = fold_of(name, fold, obs).table
        assert table.index.equals(obs.index) and (table["perturbation"] == obs["perturbation"]).all()
        assert list(table["subgroup"]) == slow_subgroups(table.assign(context=obs["context"]))
        if name != "context":
            unseen = ~table["subgroup"].isin(["", "single_seen_heldout_cells"])
            fit = table[table["part"].isin(["train", "val"])]
            assert not set(table.loc[unseen, "perturbation"]) & set(fit["perturbation"])


def test_other_seeds_and_folds_draw_otherwise():
    base = combo(train_fraction=0.5, folds=2)
    tables = [make_split(make_obs(), base.model_copy(update={"seed": s}), f).table for s in (0, 1) for f in (0, 1)]
    tests = [frozenset(t.index[t["part"] == "test"]) for t in tables]
    assert len(set(tests)) == 4
    with pytest.raises(DataError, match="fold 2 does not exist"):
        make_split(make_obs(), base, 2)


def test_streams_do_not_depend_on_the_process():
    """Frozen: these names must be drawn on every machine and by every version."""
    tested = sorted(set(fold_of("half").table.query("part == 'test' and perturbation != 'control'")["perturbation"]))
    assert tested == FROZEN_HALF


FROZEN_HALF = ["A+B", "B+C"]


def test_a_perturbations_draw_does_not_depend_on_the_others():
    spec = SPECS["heldout_named"]
    all_cells = make_obs()
    few = all_cells[all_cells["perturbation"].isin(["control", "B", "F", "A"])]
    held = [
        set(make_split(obs, spec).table.query("part == 'test' and perturbation == 'B'").index)
        for obs in (all_cells, few)
    ]
    assert held[0] == held[1] and len(held[0]) == 9


def test_heldout_cells():
    table = fold_of("heldout_cells").table
    test = table.query("part == 'test' and perturbation != 'control'")
    assert test["perturbation"].value_counts().to_list() == [4, 4, 4]
    assert set(test["subgroup"]) == {"single_seen_heldout_cells"}
    assert set(test["perturbation"]) <= set(SINGLES)
    assert (table[table["perturbation"].isin(DOUBLES)]["part"] == "unused").all()
    assert set(table[table["part"] == "train"]["perturbation"]) == {"control", *SINGLES}
    rest = table[(table["perturbation"].isin(set(test["perturbation"]))) & (table["part"] == "train")]
    assert (rest["perturbation"].value_counts() >= 5).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"min_cells": 10}, r"0 of 6 single perturbations have more than 10 cells.*lower `min_cells`"),
        ({"min_cells": 5, "n_perturbations": 7, "n_cells": 2}, r"6 of 6 .* 7 are wanted"),
        ({"perturbations": ("A", "a")}, "no single perturbation 'a'"),
        ({"perturbations": ("A+B",)}, r"no single perturbation 'A\+B'"),
        ({"perturbations": ("A",), "n_cells": 10}, "'A' has 10 cells, so holding out 10 leaves none"),
    ],
)
def test_heldout_cells_that_cannot_be(spec, message):
    with pytest.raises(DataError, match=message):
        make_split(make_obs(), HeldoutCells(kind="heldout_cells", **{"n_cells": 4, **spec}))


def test_unseen_singles_are_a_partition():
    tested = []
    for fold in range(3):
        table = fold_of("unseen_single", fold).table
        test = table.query("part == 'test' and perturbation != 'control'")
        names = set(test["perturbation"])
        assert set(test["subgroup"]) == {"single_unseen"} and len(names) == 2
        holding = table[[bool(names & set(p.split("+"))) for p in table["perturbation"]]]
        assert set(holding["part"]) <= {"test", "unused"}
        others = table[~table.index.isin(holding.index) & (table["perturbation"] != "control")]
        assert set(others["part"]) == {"train", "val"}
        tested.append(names)
    assert set.union(*tested) == set(SINGLES) and sum(map(len, tested)) == 6


def test_combinations_are_a_partition():
    tested = []
    for fold in range(5):
        test = fold_of("kfold", fold).table.query("part == 'test' and perturbation != 'control'")
        tested += sorted(set(test["perturbation"]))
        assert set(test["subgroup"]) == {"combo_seen2"}
    assert sorted(tested) == sorted(DOUBLES)
    with pytest.raises(DataError, match="5 combinations are too few for 6 folds"):
        make_split(make_obs(), combo(folds=6, scheme="kfold"))


def test_shares_of_random_combinations():
    for fraction, n_test in ((0.0, 5), (0.5, 2), (0.8, 1)):
        table = make_split(make_obs(), combo(train_fraction=fraction)).table
        test = table.query("part == 'test' and perturbation != 'control'")
        assert test["perturbation"].nunique() == n_test


def test_gears_scheme_has_all_subgroups():
    genes = [f"G{i:02d}" for i in range(16)]
    conditions = [*genes, *("+".join(pair) for pair in itertools.combinations(genes, 2))]
    obs = make_obs(n_cells=2, n_control=4, conditions=conditions)
    spec = combo(scheme="gears", test_gene_fraction=0.25)
    table = make_split(obs, spec).table.assign(context="all")
    held = set(table[table["subgroup"] == "single_unseen"]["perturbation"])
    assert len(held) == 4
    pairs = table[(table["subgroup"] != "") & table["perturbation"].str.contains("+", regex=False)]
    sizes = pairs.groupby("subgroup")["perturbation"].nunique().to_dict()
    assert sizes == {"combo_seen0": 6, "combo_seen1": 4 * 12, "combo_seen2": 17}  # a quarter of 66
    assert list(table["subgroup"]) == slow_subgroups(table)


def test_a_triple_counts_at_most_two_seen_genes():
    obs = make_obs(conditions=("A", "B", "C", "A+B+C", "A+X+Y", "X+Y+Z"))
    table = make_split(obs, combo()).table
    found = dict(zip(table["perturbation"], table["subgroup"]))
    tested = {p: s for p, s in found.items() if "+" in p}
    assert tested == {"A+B+C": "combo_seen2", "A+X+Y": "combo_seen1", "X+Y+Z": "combo_seen0"}


def test_context_transfer():
    obs = make_obs(contexts=("T", "B"))
    extra = pd.DataFrame({"perturbation": "only_T", "context": "T"}, index=[f"x{i}" for i in range(5)])
    obs = pd.concat([obs, extra])
    table = make_split(obs, SPECS["context"], 0).table.assign(context=obs["context"])
    there = table[table["context"] == "T"]
    perturbed = there[there["perturbation"] != "control"]
    assert set(perturbed[perturbed["perturbation"] != "only_T"]["part"]) == {"test"}
    assert set(perturbed[perturbed["perturbation"] == "only_T"]["part"]) == {"unused"}
    assert set(there[there["part"].isin(["train", "val"])]["perturbation"]) == {"control"}
    assert set(table[table["part"] == "test"]["context"]) == {"T"}
    assert set(table["subgroup"]) == {"", "context"}
    with pytest.raises(DataError, match=r"no cell has context 'Tcell'"):
        make_split(obs, Context(kind="context", contexts="Tcell"))


# --- controls and validation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_control", [1, 2, 40, 41])
def test_control_halves_are_complementary(n_control):
    obs = make_obs(n_control=n_control)
    spec = combo(folds=4, val_fraction=0)
    tables = [make_split(obs, spec, fold).table for fold in range(4)]
    held = [set(t.query("part == 'test' and perturbation == 'control'").index) for t in tables]
    controls = set(obs.index[obs["perturbation"] == "control"])
    if n_control == 1:
        assert held == [set()] * 4
        return
    assert all(held) and held[0] | held[1] == held[2] | held[3] == controls
    assert not held[0] & held[1] and not held[2] & held[3]
    assert n_control < 40 or held[0] not in (held[2], held[3])
    rest = [t[t["perturbation"] != "control"] for t in tables]
    assert all(r.equals(rest[0]) for r in rest), "zero-shot folds differ in their controls only"


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_control_fraction(fraction):
    table = make_split(make_obs(n_control=40), combo(control_test_fraction=fraction)).table
    control = table[table["perturbation"] == "control"]["part"].value_counts()
    assert control.get("test", 0) == min(39, int(40 * fraction + 0.5)) and control.get("train", 0) >= 1


def test_controls_are_drawn_per_tested_context():
    obs = make_obs(contexts=("T", "B"), n_control=10)
    for name, expected in (("zero_shot", {"T": 5, "B": 5}), ("context", {"T": 5})):
        table = make_split(obs, SPECS[name], 0).table.assign(context=obs["context"])
        held = table.query("part == 'test' and perturbation == 'control'")["context"]
        assert held.value_counts().to_dict() == expected


@pytest.mark.parametrize("n_cells", [1, 2, 3, 10, 25])
def test_validation_share_per_condition(n_cells):
    obs = make_obs(n_cells=n_cells)
    table = make_split(obs, combo(val_fraction=0.5)).table
    trained = table[table["perturbation"].isin(SINGLES)]
    counts = trained.groupby("perturbation")["part"].value_counts().unstack(fill_value=0)
    assert set(trained["part"]) <= {"train", "val"} and (counts["train"] >= 1).all()
    expected = min(n_cells - 1, int(n_cells * 0.5 + 0.5))
    assert (counts.get("val", pd.Series(0, index=counts.index)) == expected).all()


# --- splits from elsewhere --------------------------------------------------------------------------------------------


def test_from_column():
    obs = make_obs()
    obs["their"] = np.where(
        obs["perturbation"].isin(DOUBLES), "ood", np.where(np.arange(len(obs)) % 4, "train", "valid")
    )
    spec = FromColumn(kind="from_column", column="their", values={"ood": "test", "valid": "val"})
    table = make_split(obs, spec).table
    assert (table["part"] == obs["their"].replace({"ood": "test", "valid": "val"})).all()
    assert set(table["subgroup"]) == {"", "combo_seen2"}
    with pytest.raises(DataError, match=r"column 'their' holds 'valid', which is not one of"):
        make_split(obs, FromColumn(kind="from_column", column="their", values={"ood": "test"}))
    with pytest.raises(DataError, match=r"no obs column 'thier'.*keys\.keep.*did you mean 'their'"):
        make_split(obs, FromColumn(kind="from_column", column="thier"))


def test_from_file(tmp_path):
    obs = make_obs()
    ours = fold_of("half", 1, obs)
    write_split(tmp_path / "world1.csv", ours)
    spec = FromFile(kind="from_file", path=str(tmp_path / "{dataset}{fold}.csv"), folds=2)
    pd.testing.assert_frame_equal(make_split(obs, spec, 1, dataset="world").table, ours.table)
    with pytest.raises(DataError, match=r"world0\.csv: cannot be read"):
        make_split(obs, spec, 0, dataset="world")


def test_from_a_plain_file(tmp_path):
    obs, path = make_obs(), tmp_path / "theirs.csv"
    ours = fold_of("zero_shot", 0, obs)
    spec = FromFile(kind="from_file", path=str(path))
    plain = ours.table.reset_index()[["cell", "part"]]
    plain[plain["part"] != "unused"].iloc[:-3].to_csv(path, index=False)
    table = make_split(obs, spec).table
    assert (table["part"].iloc[-3:] == "unused").all() and (
        table["part"].iloc[:-3] == ours.table["part"].iloc[:-3]
    ).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "stranger"}, "1 cells are not in the prepared data, such as 'stranger'"),
        ({"part": "tset"}, "part 'tset' is not one of"),
        ({"perturbation": "A+ctrl"}, r"is 'A\+ctrl' there but .* in the prepared data"),
    ],
)
def test_wrong_files_are_refused(tmp_path, change, message):
    obs, path = make_obs(), tmp_path / "theirs.csv"
    table = fold_of("zero_shot", 0, obs).table.reset_index()
    for key, value in change.items():
        table.loc[0, key] = value
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=message):
        make_split(obs, FromFile(kind="from_file", path=str(path)))


@pytest.mark.parametrize("columns", [["cell"], ["part"]])
def test_files_without_the_columns_are_refused(tmp_path, columns):
    fold_of("zero_shot").table.reset_index()[columns].to_csv(tmp_path / "theirs.csv", index=False)
    with pytest.raises(DataError, match="is missing; a split needs `cell` and `part`"):
        make_split(make_obs(), FromFile(kind="from_file", path=str(tmp_path / "theirs.csv")))


# --- empty parts ------------------------------------------------------------------------------------------------------


def test_empty_parts_are_refused_with_counts():
    singles = make_obs(conditions=SINGLES)
    message = r"leaves no perturbed cell to test \(the data hold 6 singles, 0 combinations, 41 control cells\)"
    with pytest.raises(DataError, match=message):
        make_split(singles, combo())
    with pytest.raises(DataError, match="leaves no perturbed cell to test"):
        make_split(singles, UnseenSingle(kind="unseen_single", folds=1, test_fraction=0.01))
    obs = make_obs()
    obs["part"] = np.where(obs["perturbation"] == "control", "test", "train")
    obs.loc[obs["perturbation"] == "A", "part"] = "test"
    with pytest.raises(DataError, match="leaves no control cell to train on"):
        make_split(obs, FromColumn(kind="from_column", column="part"))


def test_counts_of_parts():
    counts = count_parts(fold_of("zero_shot", 0, make_obs(n_control=40)))
    assert counts.loc[("test", "combo_seen2")].to_list() == [50, 5]
    assert counts.loc[("test", "control")].to_list() == [20, 1]
    assert counts.loc[("train", "perturbed"), "n_perturbations"] == 6
    assert counts["n_cells"].sum() == 40 + 110


def test_round_trip_and_header(tmp_path):
    split = fold_of("half", 1)
    write_split(tmp_path / "split.csv", split)
    back = read_split(tmp_path / "split.csv")
    pd.testing.assert_frame_equal(back.table, split.table)
    assert {key: back.header[key] for key in ("dataset", "split", "fold", "seed")} == {
        "dataset": "world", "split": "half", "fold": 1, "seed": 0
    }  # fmt: skip
    assert back.header["spec"]["train_fraction"] == 0.5 and len(back.header["sha256"]) == 64


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_norman_combo1000_zero_shot():
    obs = read_h5ad(SHARED / "norman2019_combo1000.h5ad").obs
    obs = pd.DataFrame({"perturbation": obs["condition"].astype(str), "context": "all"}, index=obs.index)
    counts = count_parts(make_split(obs, combo(val_fraction=0)))
    assert counts.loc[("test", "combo_seen2")].to_list() == [38 * 40, 38]
    assert counts.loc[("test", "control"), "n_cells"] == counts.loc[("train", "control"), "n_cells"] == 20
    assert counts.loc[("train", "perturbed")].to_list() == [101 * 40, 101]
