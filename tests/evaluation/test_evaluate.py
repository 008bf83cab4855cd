"""The table of scores: its keys, reasons, contexts, alignment by name, bad input, and what the figures get."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from evaluation_world import META, World, make_world, prediction_of, write_world

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import (
    SCORE_COLUMNS,
    Features,
    Prediction,
    Split,
    read_scores,
    read_split,
    write_features,
    write_h5ad,
    write_prediction,
    write_scores,
    write_split,
)
from perturbed.errors import ConfigError, DataError
from perturbed.evaluation.evaluate import evaluate, evaluate_details, write_details
from perturbed.evaluation.loading import load_truth
from perturbed.evaluation.reading import BLOCK, CellFile
from perturbed.evaluation.registry import METRICS
from perturbed.names import CONTROL

FEW = EvaluationSpec(metrics=("rmse", "pearson_delta_ctrl", "e_distance", "spread_ratio"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_table(world: World, tmp_path: Path) -> None:
    table = evaluate(world.prepared, world.split, world.additive(), EvaluationSpec(), method="mine", meta={"seed": 3})
    assert tuple(table.columns) == SCORE_COLUMNS
    assert set(table["metric"]) == set(METRICS)
    single = table[table.perturbation != "*"]
    assert len(single) == 6 * (len(METRICS) - 1) and not single.duplicated(["perturbation", "metric"]).any()
    assert set(table["method"]) == {"mine"} and set(table["seed"]) == {3}
    assert set(table["dataset"]) == {"toy"} and set(table["split"]) == {"zero_shot"} and set(table["fold"]) == {0}
    assert set(single["n_cells"]) == {24} and set(single["subgroup"]) == {"combo_seen2"}
    for p in world.tested():
        size = np.linalg.norm(world.cells(p, "test").mean(axis=0, dtype=float) - world.control())
        np.testing.assert_allclose(single[single.perturbation == p]["effect_size"], size, rtol=1e-6)
    assert (table["value"].isna() <= (table["reason"] != "")).all()  # no NaN without a reason
    write_scores(tmp_path / "scores.parquet", table)
    again = read_scores(tmp_path / "scores.parquet")
    assert len(again) == len(table)


def test_same_input_same_bytes(world: World, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scores(tmp_path / name, evaluate(world.prepared, world.split, world.additive(), EvaluationSpec()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_order_of_cells_does_not_matter(world: World, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(len(world.X))
    other = write_world(tmp_path, world.X[order], world.table.iloc[order], world.genes)
    spec = EvaluationSpec(max_cells=10)
    a = evaluate(world.prepared, world.split, world.additive(), spec)
    b = evaluate(other.prepared, other.split, world.additive(), spec)
    pd.testing.assert_frame_equal(a, b, rtol=1e-5, atol=1e-7)


def test_draws_do_not_depend_on_other_conditions(world: World, tmp_path: Path) -> None:
    """Leaving a condition out of the test changes no cell-level score of the others."""
    spec = EvaluationSpec(metrics=("e_distance", "rmse_relative", "de_pr_auc"), max_cells=8)
    table = world.table.copy()
    table.loc[table.perturbation == "g6+g7", "part"] = "unused"
    fewer = write_world(tmp_path, world.X, table, world.genes)
    a = evaluate(world.prepared, world.split, world.additive(), spec)
    b = evaluate(fewer.prepared, fewer.split, world.additive(), spec)
    pd.testing.assert_frame_equal(a[a.perturbation != "g6+g7"].reset_index(drop=True), b, rtol=1e-9)
    other = evaluate(world.prepared, world.split, world.additive(), spec.model_copy(update={"seed": 1}))
    assert (other["value"] != a["value"]).any()


def test_unused_cells_are_not_seen(world: World, tmp_path: Path) -> None:
    table, X = world.table.copy(), world.X.copy()
    unused = ((table.perturbation == "g7") | (table.perturbation == "g6+g7")).to_numpy()
    table.loc[unused, "part"] = "unused"
    one = write_world(tmp_path / "one", X, table, world.genes)
    X[unused] = 99.0
    two = write_world(tmp_path / "two", X, table, world.genes)
    a, b = (evaluate(w.prepared, w.split, world.additive(), EvaluationSpec()) for w in (one, two))
    pd.testing.assert_frame_equal(a, b)


def test_files_and_names(world: World, tmp_path: Path) -> None:
    """A user's file: means, gene names and perturbations; further genes and other orders are fine."""
    additive = world.additive()
    extra = np.hstack([additive.mean, np.full((6, 2), 7.0)])[:, ::-1]
    obs = pd.DataFrame({"perturbation": additive.perturbation}, index=[f"r{i}" for i in range(6)])
    var = pd.DataFrame(index=[*world.genes, "x1", "x2"][::-1])
    anndata.AnnData(extra.astype(np.float32), obs=obs, var=var).write_h5ad(tmp_path / "mine.h5ad")
    theirs = evaluate(world.prepared, world.split, tmp_path / "mine.h5ad", FEW)
    ours = evaluate(world.prepared, world.split, additive, FEW)
    np.testing.assert_allclose(theirs["value"], ours["value"], rtol=1e-4, atol=1e-4)
    assert set(theirs["method"]) == {"mine"}


def test_missing_genes(world: World) -> None:
    additive = world.additive()
    short = Prediction(additive.mean[:, 3:], additive.genes[3:], additive.perturbation, additive.context)
    with pytest.raises(DataError, match=r"3 of 60 scored genes are missing \(g0, g1, g2\)"):
        evaluate(world.prepared, world.split, short, FEW)


def test_other_split(world: World) -> None:
    additive = world.additive()
    stale = Prediction(
        additive.mean, additive.genes, additive.perturbation, additive.context, meta={"split_sha256": "0"}
    )
    with pytest.raises(DataError, match="another split"):
        evaluate(world.prepared, world.split, stale, FEW)


def test_unknown_metric(world: World) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'rmsee'"):
        evaluate(world.prepared, world.split, world.additive(), EvaluationSpec(metrics=("rmsee",)))


def test_not_predicted_and_refused(world: World) -> None:
    additive = world.additive()
    part = Prediction(
        additive.mean[:4], additive.genes, additive.perturbation[:4], additive.context[:4],
        refused={additive.perturbation[4]: "never saw g6"},
    )  # fmt: skip
    table = evaluate(world.prepared, world.split, part, FEW)
    reasons = table[table["value"].isna()].groupby("perturbation")["reason"].unique()
    assert list(reasons[additive.perturbation[4]]) == ["never saw g6"]
    assert list(reasons[additive.perturbation[5]]) == ["not predicted"]
    whole = table[table.perturbation == "*"].iloc[0]
    assert whole["reason"] == "4 of 6 test perturbations scored" and np.isfinite(whole["value"])
    full = evaluate(world.prepared, world.split, additive, FEW)
    kept = table[table["value"].notna() & (table.perturbation != "*")]
    merged = kept.merge(full, on=["perturbation", "metric"])
    np.testing.assert_allclose(merged["value_x"], merged["value_y"])


def test_too_few_cells(world: World, tmp_path: Path) -> None:
    table = world.table.copy()
    rare = np.flatnonzero(table.perturbation == "g6+g7")
    table.iloc[rare[1:], table.columns.get_loc("part")] = "unused"
    one = write_world(tmp_path, world.X, table, world.genes)
    scores = evaluate(one.prepared, one.split, world.additive(), EvaluationSpec())
    rows = scores[scores.perturbation == "g6+g7"]
    assert rows["value"].isna().all() and set(rows["reason"]) == {"1 test cells, fewer than min_cells 2"}
    lenient = evaluate(one.prepared, one.split, world.additive(), EvaluationSpec(min_cells=1))
    rows = lenient[lenient.perturbation == "g6+g7"].set_index("metric")
    assert np.isfinite(rows.loc["rmse", "value"])
    assert rows.loc["e_distance", "reason"] == "fewer than 2 cells"
    assert rows.loc["de_overlap", "reason"] == "fewer than 2 cells for the differential test"
    assert rows.loc["wmse", "reason"] == "fewer than 2 cells for the weights"


def test_contexts(tmp_path: Path) -> None:
    """Each context has its own control, perturbed mean and peers; a context without training perturbations borrows."""
    world = make_world(tmp_path / "both", contexts=("A", "B"))
    means = [world.additive(context) for context in ("A", "B")]
    both = Prediction(
        np.vstack([m.mean for m in means]), means[0].genes, means[0].perturbation * 2, ("A",) * 6 + ("B",) * 6
    )
    table = evaluate(world.prepared, world.split, both, EvaluationSpec())
    for context, prediction in zip("AB", means):
        for p, hat in zip(prediction.perturbation, prediction.mean):
            x = world.cells(p, "test", context).mean(axis=0, dtype=float)
            row = table[(table.perturbation == p) & (table.context == context)].set_index("metric")["value"]
            for name, reference in (
                ("pearson_delta_ctrl", world.control(context)),
                ("pearson_delta_pert", world.trained_mean(context)),
            ):
                expected = np.corrcoef(x - reference, hat - reference)[0, 1]
                assert row[name] == pytest.approx(expected, rel=1e-5)
    assert len(table[table.perturbation == "*"]) == 2

    transfer = world.table.copy()
    transfer.loc[(transfer.context == "B") & (transfer.perturbation != CONTROL), "part"] = "test"
    moved = write_world(tmp_path / "moved", world.X, transfer, world.genes)
    truth = load_truth(moved.prepared, moved.split, EvaluationSpec())
    trained = [moved.cells(f"g{i}", ("train", "val"), "A").mean(axis=0, dtype=float) for i in range(8)]
    effect = np.mean(trained, axis=0) - moved.control("A")
    np.testing.assert_allclose(truth.contexts["B"].perturbed_mean, moved.control("B") + effect, rtol=1e-5)
    index = next(i for i in range(len(truth)) if truth.key(i) == ("g0", "B"))
    assert truth.background(index).n == 24 * 13  # the other test perturbations of B


def test_context_must_be_named(tmp_path: Path) -> None:
    world = make_world(tmp_path / "both", contexts=("A", "B"))
    with pytest.raises(DataError, match=r"obs\['context'\] is missing.*\(A, B\)"):
        evaluate(world.prepared, world.split, prediction_of({"g0+g1": world.control("A")}, world.genes), FEW)
    alone = make_world(tmp_path / "one", contexts=("A",))
    named = alone.additive("A")
    unnamed = Prediction(named.mean, named.genes, named.perturbation, ("all",) * 6)
    a, b = (evaluate(alone.prepared, alone.split, p, FEW) for p in (named, unnamed))
    pd.testing.assert_frame_equal(a, b)


def test_features_choose_genes_and_loadings(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    genes = list(rng.permutation(world.genes)[:30])
    loadings = np.linalg.qr(rng.normal(size=(30, 4)))[0]
    frame = pd.DataFrame({"mean": 0.2, "sd": 1.0, **{f"pc{i + 1}": loadings[:, i] for i in range(4)}}, index=genes)
    sha256 = read_split(world.split).header["sha256"]
    write_features(tmp_path / "features.csv", Features(frame, {"split_sha256": sha256}))
    features = tmp_path / "features.csv"
    table = evaluate(world.prepared, world.split, world.additive(), FEW, features=features)
    columns = [world.genes.index(g) for g in genes]
    additive = world.additive()
    for p, hat in zip(additive.perturbation, additive.mean):
        x = world.cells(p, "test").mean(axis=0, dtype=float)
        rmse = table[(table.perturbation == p) & (table.metric == "rmse")]["value"].iloc[0]
        assert rmse == pytest.approx(np.sqrt(np.mean((x - hat)[columns] ** 2)), rel=1e-5)
    embedding, _ = evaluate_details(world.prepared, world.split, additive, FEW, features=features)
    control = embedding[embedding.kind == "control"][["pc1", "pc2"]].to_numpy()[0]
    np.testing.assert_allclose(control, (world.control()[columns] - 0.2) @ loadings[:, :2], rtol=1e-4)

    write_features(tmp_path / "other.csv", Features(frame, {"split_sha256": "0" * 64}))
    with pytest.raises(DataError, match="another split"):
        evaluate(world.prepared, world.split, additive, FEW, features=tmp_path / "other.csv")
    write_features(tmp_path / "more.csv", Features(frame.rename(index={genes[0]: "zzz"}), {"split_sha256": sha256}))
    with pytest.raises(DataError, match="gene 'zzz' is not in"):
        evaluate(world.prepared, world.split, additive, FEW, features=tmp_path / "more.csv")


def test_details(world: World, tmp_path: Path) -> None:
    additive = world.additive()
    part = Prediction(additive.mean[:5], additive.genes, additive.perturbation[:5], additive.context[:5])
    embedding, deltas = evaluate_details(world.prepared, world.split, part, FEW, meta={"method": "additive"})
    assert list(embedding.columns) == [
        *("dataset", "split", "fold", "method", "seed", "perturbation", "context", "kind", "pc1", "pc2")
    ]
    assert embedding.groupby("kind").size().to_dict() == {"control": 1, "observed": 6, "predicted": 5}
    assert len(deltas) == 6 * 60 and deltas["observed"].dtype == deltas["predicted"].dtype == np.float32
    row = deltas[(deltas.perturbation == additive.perturbation[0]) & (deltas.gene == "g9")].iloc[0]
    x = world.cells(additive.perturbation[0], "test").mean(axis=0, dtype=float)
    assert row["observed"] == pytest.approx(x[9] - world.control()[9], abs=1e-5)
    assert row["predicted"] == pytest.approx(additive.mean[0, 9] - world.control()[9], abs=1e-5)
    assert deltas[deltas.perturbation == additive.perturbation[5]]["predicted"].isna().all()
    write_details(world.prepared, world.split, part, None, tmp_path, meta={"method": "additive"})
    assert len(pd.read_csv(tmp_path / "embedding.csv")) == 12
    stored = pd.read_parquet(tmp_path / "deltas.parquet")
    np.testing.assert_array_equal(stored["observed"], deltas["observed"])
    assert set(stored["method"]) == {"additive"}


def test_prediction_file_with_cells(world: World, tmp_path: Path) -> None:
    additive = world.additive()
    rng = np.random.default_rng(1)
    cells = tuple(rng.normal(row, 0.5, (15, 60)) for row in additive.mean)
    full = Prediction(
        additive.mean, additive.genes, additive.perturbation, additive.context, cells=cells,
        meta={"method": "sampler", "seed": 4},
    )  # fmt: skip
    write_prediction(tmp_path / "prediction.h5ad", full)
    a = evaluate(world.prepared, world.split, full, FEW)
    b = evaluate(world.prepared, world.split, tmp_path / "prediction.h5ad", FEW)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert set(b["method"]) == {"sampler"} and set(b["seed"]) == {4}


# --- bad input ----------------------------------------------------------------------------------------------------


def test_files_that_do_not_belong_together(world: World, tmp_path: Path) -> None:
    table = world.table.rename(index={world.table.index[0]: "stranger"})
    write_split(tmp_path / "a.csv", Split(table[["perturbation", "part", "subgroup"]], META))
    with pytest.raises(DataError, match="cell 'stranger' is not in"):
        evaluate(world.prepared, tmp_path / "a.csv", world.additive(), FEW)
    table = world.table.copy()
    table.iloc[0, table.columns.get_loc("perturbation")] = "g9"
    write_split(tmp_path / "b.csv", Split(table[["perturbation", "part", "subgroup"]], META))
    with pytest.raises(DataError, match="has another perturbation"):
        evaluate(world.prepared, tmp_path / "b.csv", world.additive(), FEW)
    table = world.table.copy()
    table.loc[table.perturbation == CONTROL, "part"] = "test"
    write_split(tmp_path / "c.csv", Split(table[["perturbation", "part", "subgroup"]], META))
    with pytest.raises(DataError, match="context 'all' has test cells but no control cells in train or val"):
        evaluate(world.prepared, tmp_path / "c.csv", world.additive(), FEW)


def test_broken_files(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        evaluate(tmp_path / "none.h5ad", world.split, world.additive(), FEW)
    whole = world.prepared.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable h5ad"):
        evaluate(tmp_path / "cut.h5ad", world.split, world.additive(), FEW)
    adata = anndata.read_h5ad(world.prepared)
    del adata.obs["context"]
    write_h5ad(tmp_path / "raw.h5ad", adata)
    with pytest.raises(DataError, match=r"obs\['context'\] is missing"):
        evaluate(tmp_path / "raw.h5ad", world.split, world.additive(), FEW)
    adata = anndata.read_h5ad(world.prepared)
    adata.X = adata.X.tocsc()
    write_h5ad(tmp_path / "csc.h5ad", adata)
    with pytest.raises(DataError, match="stored as csc_matrix"):
        evaluate(tmp_path / "csc.h5ad", world.split, world.additive(), FEW)


@pytest.mark.parametrize("dense", [False, True])
def test_rows_are_read_in_blocks(tmp_path: Path, dense: bool) -> None:
    rng = np.random.default_rng(0)
    n = 2 * BLOCK + 100
    X = (rng.random((n, 7)) * (rng.random((n, 7)) < 0.3)).astype(np.float32)
    table = pd.DataFrame(
        {"perturbation": CONTROL, "context": "all", "part": ["train", "test"] * (n // 2), "subgroup": ""},
        index=[f"c{i}" for i in range(n)],
    )
    world = write_world(tmp_path, X, table, [f"g{i}" for i in range(7)])
    path = world.prepared
    if dense:
        adata = anndata.read_h5ad(path)
        adata.X = adata.X.toarray()
        path = tmp_path / "dense.h5ad"
        write_h5ad(path, adata)
    wanted = rng.permutation(n)[:3000]
    with CellFile(path) as file:
        np.testing.assert_array_equal(file.take(wanted).toarray(), X[wanted])
        np.testing.assert_array_equal(file.take(wanted, np.array([5, 0])).toarray(), X[wanted][:, [5, 0]])
        assert max(len(rows) for rows, _ in file.blocks(wanted)) <= BLOCK
