from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest

from data_world import make_fold, make_prepared
from perturbed.data.contracts import (
    SCORE_COLUMNS,
    Features,
    Prediction,
    Split,
    read_features,
    read_h5ad,
    read_prediction,
    read_prepared,
    read_scores,
    read_split,
    read_table,
    write_features,
    write_h5ad,
    write_prediction,
    write_scores,
    write_split,
    write_table,
)
from perturbed.errors import DataError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.obs.drop(columns="context", inplace=True), r"obs\['context'\] is missing"),
        (lambda a: a.obs.drop(columns="perturbation", inplace=True), r"obs\['perturbation'\] is missing"),
        (lambda a: a.var.drop(columns="symbol", inplace=True), r"var\['symbol'\] is missing"),
        (lambda a: a.uns.pop("perturbed"), r"uns\['perturbed'\] is missing"),
    ],
)
def test_prepared_files_are_checked(tmp_path, change, message):
    path = make_prepared(tmp_path)
    adata = read_prepared(path)
    change(adata)
    write_h5ad(path, adata)
    with pytest.raises(DataError, match=rf"prepared\.h5ad: not a prepared file: {message}"):
        read_prepared(path)


def test_tables_carry_a_hash(tmp_path):
    path, table = tmp_path / "table.csv", pd.DataFrame({"a": [1, 2], "b": [0.1, np.nan]})
    digest = write_table(path, table, {"seed": 3, "names": ["x"]})
    back, header = read_table(path)
    assert header == {"seed": 3, "names": ["x"], "sha256": digest}
    pd.testing.assert_frame_equal(back, table)
    assert write_table(tmp_path / "again.csv", back, {"seed": 3, "names": ["x"]}) == digest
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("1,0.1", "1,0.2"), "sha256 does not match its content; delete it and rerun"),
        (lambda text: text[:-4], "sha256 does not match"),
        (lambda text: text[text.index("a,b") :], "sha256 does not match"),
        (lambda text: text.replace('"sha256"', "sha256").replace("# seed: 3", "# seed: {"), "header cannot be read"),
    ],
)
def test_changed_tables_are_refused(tmp_path, change, message):
    path = tmp_path / "table.csv"
    write_table(path, pd.DataFrame({"a": [1, 2], "b": [0.1, 0.5]}), {"seed": 3})
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=rf"table\.csv: .*{message}"):
        read_table(path)


def split_of(**columns) -> Split:
    table = {"perturbation": ["control", "A", "B"], "part": ["train", "train", "test"], "subgroup": ["", "", "context"]}
    return Split(pd.DataFrame({**table, **columns}, index=pd.Index(["c1", "c2", "c3"], name="cell")), {"seed": 0})


def test_splits_round_trip(tmp_path):
    write_split(tmp_path / "split.csv", split_of(perturbation=["control", "NA", "nan"]))
    back = read_split(tmp_path / "split.csv")
    assert list(back.table["perturbation"]) == ["control", "NA", "nan"], "genes that pandas would take for missing"
    assert list(back.table["subgroup"]) == ["", "", "context"] and list(back.cells("train")) == ["c1", "c2"]
    write_split(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "split.csv").read_bytes()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (["train", "train", "tset"], "part 'tset' is not one of"),
        (["train", "train", "val"], "the test part is empty; loosen"),
        (["val", "val", "test"], "the train part is empty"),
    ],
)
def test_bad_splits_are_not_written(tmp_path, part, message):
    with pytest.raises(DataError, match=message):
        write_split(tmp_path / "split.csv", split_of(part=part))
    assert not (tmp_path / "split.csv").exists()


def test_a_cell_in_two_rows_is_refused(tmp_path):
    twice = Split(split_of().table.iloc[[0, 1, 2, 2]])
    with pytest.raises(DataError, match="cell 'c3' stands in two rows"):
        write_split(tmp_path / "split.csv", twice)


def test_features_round_trip(tmp_path):
    _, path = make_fold(tmp_path, make_prepared(tmp_path))
    features = read_features(path)
    np.testing.assert_allclose(features.loadings.T @ features.loadings, np.eye(5), atol=1e-7)
    write_features(tmp_path / "again.csv", features)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    write_features(path, Features(features.table.drop(columns="sd"), features.header))
    with pytest.raises(DataError, match="column 'sd' is missing"):
        read_features(path)


def prediction(**keys) -> Prediction:
    base = {"mean": np.arange(6.0).reshape(2, 3), "genes": ("x", "y", "z"), "perturbation": ("A+B", "C")}
    return Prediction(**{**base, "context": ("all", "all"), **keys})


@pytest.mark.filterwarnings("ignore:Observation names are not unique")  # anndata, before cells are numbered
def test_predictions_round_trip(tmp_path):
    cells = (np.ones((4, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.float32))
    given = prediction(variance=np.ones((2, 3)), refused={"D": "never seen"}, cells=cells, meta={"seed": 1})
    write_prediction(tmp_path / "prediction.h5ad", given)
    back = read_prediction(tmp_path / "prediction.h5ad")
    np.testing.assert_array_equal(back.mean, given.mean)
    assert back.genes == given.genes and back.perturbation == given.perturbation and back.context == given.context
    assert back.refused == given.refused and back.meta == given.meta and [len(c) for c in back.cells] == [4, 2]
    np.testing.assert_array_equal(back.cells[0], cells[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"perturbation": ("C", "C")}, r"'C\|all' is predicted twice"),
        ({"mean": np.array([[0, 1, 2], [0, np.nan, 1.0]])}, r"the prediction of 'C\|all' holds NaN or inf"),
        ({"genes": ("x", "x", "z")}, "gene 'x' occurs twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_bad_predictions_are_refused(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        write_prediction(tmp_path / "prediction.h5ad", prediction(**keys))
    assert not (tmp_path / "prediction.h5ad").exists()


def test_a_users_prediction_needs_little(tmp_path):
    path = tmp_path / "mine.h5ad"
    obs = pd.DataFrame({"perturbation": ["A"]}, index=["0"])
    anndata.AnnData(np.ones((1, 2)), obs=obs, var=pd.DataFrame(index=["x", "y"])).write_h5ad(path)
    found = read_prediction(path)
    assert found.context == ("all",) and found.refused == {} and found.cells is None
    anndata.AnnData(np.ones((1, 2)), var=pd.DataFrame(index=["x", "y"])).write_h5ad(path)
    with pytest.raises(DataError, match=r"obs\['perturbation'\] is missing; name the perturbation of each row"):
        read_prediction(path)


def test_scores_round_trip(tmp_path):
    row = {"dataset": "d", "split": "s", "fold": 0, "method": "m", "seed": 0, "context": "all", "perturbation": "B"}
    row |= {"subgroup": "combo_seen2", "n_cells": 3, "effect_size": 0.5, "metric": "rmse", "value": 1.0, "reason": ""}
    table = pd.DataFrame([row, {**row, "perturbation": "A", "value": np.nan, "reason": "undefined"}])
    write_scores(tmp_path / "scores.parquet", table)
    back = read_scores(tmp_path / "scores.parquet")
    assert list(back["perturbation"]) == ["A", "B"] and tuple(back.columns) == SCORE_COLUMNS
    table.drop(columns="reason").to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="column 'reason' is missing"):
        read_scores(tmp_path / "scores.parquet")
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_scores(tmp_path / "scores.parquet")


def test_files_that_are_no_h5ad(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_h5ad(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"text\.h5ad: not a readable h5ad"):
        read_h5ad(tmp_path / "text.h5ad")
