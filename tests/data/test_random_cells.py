"""The split of cells at random, and genes that are kept among the features whatever they vary."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from data_world import DOUBLES, SINGLES, make_fold, make_prepared
from perturbed.config import FeatureSpec, RandomCells
from perturbed.data.contracts import open_prepared, read_features, read_split
from perturbed.data.split import make_split
from perturbed.errors import DataError
from perturbed.evaluation.leakage import check_leakage


def obs(n=100, names=("control", "A", "B"), contexts=("x", "y")) -> pd.DataFrame:
    rows = list(itertools.chain.from_iterable([pair] * n for pair in itertools.product(names, contexts)))
    table = pd.DataFrame(rows, columns=["perturbation", "context"], index=[f"c{i:04d}" for i in range(len(rows))])
    return table.sample(frac=1, random_state=0)


def spec(**keys) -> RandomCells:
    return RandomCells(kind="random_cells", **keys)


def test_shares_of_every_condition_are_the_papers():
    cells = obs()
    parts = make_split(cells, spec()).table["part"].reindex(cells.index)
    counts = parts.groupby([cells["perturbation"], cells["context"]]).value_counts().unstack()
    assert (counts["train"] == 82).all() and (counts["val"] == 9).all() and (counts["test"] == 9).all()


def test_without_strata_only_the_total_is_exact():
    parts = make_split(obs(), spec(stratified=False)).table["part"].value_counts()
    assert parts.to_dict() == {"train": 492, "val": 54, "test": 54}


def test_a_tenth_of_a_perturbation_is_kept_and_the_rest_unused():
    cells = obs()
    table = make_split(cells, spec(keep={"A": 0.1})).table
    kept = table[table["perturbation"] == "A"]["part"]
    assert (kept != "unused").sum() == 20 and (table[table["perturbation"] != "A"]["part"] != "unused").all()


def test_draws_depend_on_the_seed_and_not_on_the_order():
    cells = obs()
    one, other = make_split(cells, spec()).table, make_split(cells[::-1], spec()).table
    pd.testing.assert_frame_equal(one, other.reindex(one.index))
    assert (one["part"] != make_split(cells, spec(seed=1)).table["part"]).any()


def test_an_atlas_without_perturbation_can_be_split():
    parts = make_split(obs(names=("control",)), spec()).table
    assert set(parts["part"]) == {"train", "val", "test"} and set(parts["subgroup"]) == {""}


def test_a_combination_that_trains_is_never_tested():
    table = make_split(obs(names=("control", "A", "A+B")), spec()).table
    assert set(table.loc[table["perturbation"] == "A+B", "part"]) == {"train", "val", "unused"}


def test_an_unknown_perturbation_to_keep_is_named():
    with pytest.raises(DataError, match="no perturbation 'C'"):
        make_split(obs(), spec(keep={"C": 0.5}))


def test_nothing_leaks_and_genes_are_kept(tmp_path):
    prepared = make_prepared(tmp_path)
    dull = [f"g{i:03d}" for i in range(30)]
    split, features = make_fold(tmp_path, prepared, spec(), FeatureSpec(n_hvg=5, n_pcs=3, keep_genes=(*dull, "none")))
    found = read_features(features)
    assert set(dull) <= set(found.genes) and "none" not in set(found.genes)
    report = check_leakage(open_prepared(prepared), read_split(split), found)
    assert all(check["ok"] for check in report["checks"])
    table = read_split(split).table
    assert set(table.loc[table["subgroup"] != "", "perturbation"]) <= set(SINGLES)
    assert not set(table.loc[table["part"] == "test", "perturbation"]) & set(DOUBLES)
    assert np.isin(table["part"], ("train", "val", "test", "unused")).all()
