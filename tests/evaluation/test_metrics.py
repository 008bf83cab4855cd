"""Every metric against a slow reference written out here, at its axioms, and where it is undefined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_slow import Slow
from evaluation_world import World, make_world, prediction_of
from sklearn.metrics import r2_score

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Prediction
from perturbed.evaluation.case import BATCH, ROUNDING, SHIFTED, Case
from perturbed.evaluation.evaluate import score_prediction
from perturbed.evaluation.loading import load_truth
from perturbed.evaluation.metrics.direction import correlate
from perturbed.evaluation.metrics.ranking import mid_rank_score
from perturbed.evaluation.registry import METRICS, Undefined, select_metrics
from perturbed.evaluation.scoring import align
from perturbed.evaluation.truth import Truth
from perturbed.names import CONTROL, genes_of

# 24 test cells and 24 held-out control cells: nothing is left to the draw of cells
SPEC = EvaluationSpec(n_top_de=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), n_control=48)


@pytest.fixture(scope="module")
def truth(world: World) -> Truth:
    return load_truth(world.prepared, world.split, SPEC)


@pytest.fixture(scope="module")
def prediction(world: World) -> Prediction:
    additive = world.additive()
    noise = np.random.default_rng(1).normal(0, 0.3, additive.mean.shape)
    return prediction_of(dict(zip(additive.perturbation, additive.mean + noise)), world.genes)


@pytest.fixture(scope="module")
def scores(truth: Truth, prediction: Prediction) -> pd.DataFrame:
    return score_prediction(truth, prediction)


def value(scores: pd.DataFrame, metric: str, perturbation: str) -> float:
    row = scores[(scores.metric == metric) & (scores.perturbation == perturbation)]
    assert len(row) == 1
    return float(row["value"].iloc[0])


def test_every_metric_against_a_slow_reference(world: World, prediction: Prediction, scores: pd.DataFrame) -> None:
    for p, hat in zip(prediction.perturbation, prediction.mean):
        for name, expected in Slow(world, p, hat).metrics().items():
            assert value(scores, name, p) == pytest.approx(expected, rel=2e-5, abs=1e-7), (name, p)


def test_every_metric_has_a_slow_reference(world: World, prediction: Prediction) -> None:
    slow = set(Slow(world, prediction.perturbation[0], prediction.mean[0]).metrics())
    elsewhere = {"e_distance", "mmd_rbf", "mmd_published", "rmse_relative_sampled", "spread_ratio"}
    assert slow | elsewhere == set(METRICS)


def test_distribution_metrics_against_loops(world: World, truth: Truth, prediction: Prediction) -> None:
    """With sampled cells, as many as there are test cells: nothing is drawn."""
    names = list(prediction.perturbation)
    rng = np.random.default_rng(8)
    cells = tuple(np.maximum(rng.normal(row, 0.7, (24, len(row))), 0) for row in prediction.mean)
    sampled = prediction_of(dict(zip(names, prediction.mean)), world.genes, cells=cells)
    table = score_prediction(truth, sampled)
    t = world.table
    trained = world.X[t.part.isin(["train", "val"]).to_numpy()].astype(float)
    centred = trained - trained.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:50].T

    def euclid(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.linalg.norm(u - v) for v in b] for u in a])

    def off(matrix: np.ndarray) -> float:
        return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())

    controls = world.cells(CONTROL, "test")
    observed = np.vstack([*(world.cells(p, "test") for p in names), controls]) @ directions
    sigma = np.median(euclid(observed, observed)[np.triu_indices(len(observed), 1)])
    for p, own in list(zip(names, cells))[:2]:
        x, y = world.cells(p, "test") @ directions, own @ directions
        expected = 2 * euclid(x, y).mean() - off(euclid(x, x)) - off(euclid(y, y))
        assert value(table, "e_distance", p) == pytest.approx(expected, rel=1e-4)
        k = [np.exp(-(euclid(a, b) ** 2) / (2 * sigma**2)) for a, b in ((x, x), (y, y), (x, y))]
        assert value(table, "mmd_rbf", p) == pytest.approx(off(k[0]) + off(k[1]) - 2 * k[2].mean(), rel=1e-3)
        z = [world.cells(p, "test").astype(float), own]
        total = 0.0
        for i in range(10):
            k = [np.exp(-(euclid(a, b) ** 2) / (1000 / 32 * 2**i)) for a, b in ((z[0],) * 2, (z[1],) * 2, z)]
            total += k[0].mean() + k[1].mean() - 2 * k[2].mean()
        assert value(table, "mmd_published", p) == pytest.approx(total, rel=1e-4)
    assert not table[table.metric == "e_distance"]["reason"].any()


def test_means_are_scored_as_shifted_control_cells(world: World, truth: Truth, prediction: Prediction) -> None:
    table = score_prediction(truth, prediction)
    controls = world.cells(CONTROL, ("train", "val"))
    assert len(controls) == 24
    cells = tuple(controls + (row - world.control()) for row in prediction.mean)
    by_hand = prediction_of(dict(zip(prediction.perturbation, prediction.mean)), world.genes, cells=cells)
    expected = score_prediction(truth, by_hand)
    for metric in ("e_distance", "mmd_rbf"):
        for p in prediction.perturbation:
            assert value(table, metric, p) == pytest.approx(value(expected, metric, p), rel=1e-5)
        assert set(table[table.metric == metric]["reason"]) == {SHIFTED}


def test_sampled_rmse(world: World, truth: Truth, prediction: Prediction) -> None:
    """Constant sampled cells make it the plain relative RMSE, whatever the pairing; without cells there is none."""
    cells = tuple(np.tile(row, (40, 1)) for row in prediction.mean)
    constant = prediction_of(dict(zip(prediction.perturbation, prediction.mean)), world.genes, cells=cells)
    table = score_prediction(truth, constant)
    for p in prediction.perturbation:
        assert value(table, "rmse_relative_sampled", p) == pytest.approx(value(table, "rmse_relative", p), rel=1e-9)
    without = score_prediction(truth, prediction)
    rows = without[without.metric == "rmse_relative_sampled"]
    assert rows["value"].isna().all() and set(rows["reason"]) == {"the method gives no sampled cells"}


def test_batches_of_the_published_metrics(tmp_path: Path) -> None:
    world = make_world(tmp_path, n_cells=75)
    truth = load_truth(world.prepared, world.split, SPEC)
    prediction = world.additive()
    table = score_prediction(truth, prediction)
    for case in cases(truth, prediction):
        batches, note = case.batches()
        assert [b.shape[0] for b in batches] == [BATCH, BATCH] and note == ""
        dense = [b.toarray().astype(float) for b in batches]
        flat = [tuple(row) for b in dense for row in b]
        assert len(set(flat)) == 2 * BATCH  # disjoint
        p, hat = truth.key(case.index)[0], case.predicted
        relative = [np.sqrt(((hat - b) ** 2).mean() / (b**2).mean()) for b in dense]
        assert value(table, "rmse_relative", p) == pytest.approx(np.mean(relative), rel=1e-9)
        clipped = [max(0.0, r2_score(hat, b.mean(axis=0))) for b in dense]
        assert value(table, "r2_published", p) == pytest.approx(np.mean(clipped), rel=1e-9)
        flat_r2 = [r2_score(b.ravel(), np.tile(hat, BATCH)) for b in dense]
        assert value(table, "r2_cells", p) == pytest.approx(np.mean(flat_r2), rel=1e-9)


def test_published_mmd_repeats_scarce_control_cells(tmp_path: Path) -> None:
    """The predecessor draws control partners with replacement, so few control cells do not undo its number."""
    world = make_world(tmp_path, n_cells=40, n_control=20)  # 10 control cells train, a batch has 32
    truth = load_truth(world.prepared, world.split, EvaluationSpec(metrics=("mmd_published", "e_distance")))
    table = score_prediction(truth, world.additive())
    rows = table[table.metric == "mmd_published"]
    assert rows["value"].notna().all() and set(rows["reason"]) == {f"{SHIFTED}; 10 cells repeated"}
    for case in cases(truth, world.additive()):
        cells = case.predicted_cells(32) - case.predicted_effect
        assert len({tuple(np.round(row, 5)) for row in cells}) == 10
        observed, predicted = case.score_samples()
        assert len(observed) == len(predicted) == 10  # the unbiased ones never repeat a cell


def cases(truth: Truth, prediction: Prediction) -> list[Case]:
    return [Case(truth, i, row) for i, row in enumerate(align(truth, prediction, "p")) if not isinstance(row, str)]


def test_spread_ratio(world: World, truth: Truth, prediction: Prediction, scores: pd.DataFrame) -> None:
    observed = np.stack([world.cells(p, "test").mean(axis=0, dtype=float) for p in prediction.perturbation])
    expected = sum(prediction.mean.var(axis=0)) / sum(observed.var(axis=0))
    assert value(scores, "spread_ratio", "*") == pytest.approx(expected, rel=1e-5)
    collapsed = prediction_of(dict.fromkeys(prediction.perturbation, world.trained_mean()), world.genes)
    assert value(score_prediction(truth, collapsed), "spread_ratio", "*") == pytest.approx(0, abs=1e-12)
    one = prediction_of({prediction.perturbation[0]: prediction.mean[0]}, world.genes)
    row = score_prediction(truth, one).query("metric == 'spread_ratio'").iloc[0]
    assert np.isnan(row["value"]) and "fewer than 2 predicted" in row["reason"]
    assert "1 of 6 test perturbations scored" in row["reason"]


# --- axioms -------------------------------------------------------------------------------------------------------


def test_perfect_prediction_is_perfect(world: World, truth: Truth) -> None:
    perfect = prediction_of({p: world.cells(p, "test").mean(axis=0, dtype=float) for p in world.tested()}, world.genes)
    table = score_prediction(truth, perfect)
    differs = {
        *("pearson_delta_ctrl_disjoint", "de_overlap", "de_pr_auc", "de_direction"),  # other controls on the two sides
        *("rmse_relative", "r2_cells", "rmse_relative_sampled", "e_distance", "mmd_rbf", "mmd_published"),  # cells
    }
    for name, metric in METRICS.items():
        if name not in differs:
            got = table[table.metric == name]["value"]
            np.testing.assert_allclose(got, metric.perfect, atol=1e-6, err_msg=name)
    for p in world.tested():
        assert value(table, "de_direction", p) > 0.9
        assert value(table, "pearson_delta_ctrl_disjoint", p) > 0.8


def test_worse_predictions_score_worse(world: World, truth: Truth) -> None:
    """Blending the truth with another perturbation's lowers every metric, in its own direction."""
    names = world.tested()
    means = {p: world.cells(p, "test").mean(axis=0, dtype=float) for p in names}
    swapped = dict(zip(names, [*names[1:], names[0]]))
    averages = []
    for share in (0.0, 0.3, 0.6, 1.0):
        blended = {p: (1 - share) * means[p] + share * means[swapped[p]] for p in names}
        table = score_prediction(truth, prediction_of(blended, world.genes))
        averages.append(table.groupby("metric")["value"].mean())
    for name, metric in METRICS.items():
        series = np.array([a[name] for a in averages])
        if metric.direction != 0 and name != "rmse_relative_sampled":
            assert metric.direction * (series[0] - series[-1]) > 0, name
            assert np.all(metric.direction * np.diff(series) <= 1e-9), name


def test_order_of_genes_and_rows_does_not_matter(world: World, truth: Truth, prediction: Prediction) -> None:
    rng = np.random.default_rng(2)
    genes, rows = rng.permutation(len(world.genes)), rng.permutation(len(prediction.perturbation))
    shuffled = Prediction(
        prediction.mean[np.ix_(rows, genes)],
        tuple(np.array(world.genes)[genes]),
        tuple(np.array(prediction.perturbation)[rows]),
        prediction.context,
    )
    pd.testing.assert_frame_equal(score_prediction(truth, prediction), score_prediction(truth, shuffled))


def test_shared_scale_does_not_change_correlations(world: World, truth: Truth, prediction: Prediction) -> None:
    c = world.control()
    doubled = prediction_of(dict(zip(prediction.perturbation, c + 2 * (prediction.mean - c))), world.genes)
    a, b = score_prediction(truth, prediction), score_prediction(truth, doubled)
    for name in (
        "pearson_delta_ctrl",
        "pearson_delta_ctrl_disjoint",
        "cosine",
        "pds_cosine",
        "de_overlap",
        "de_pr_auc",
    ):
        for p in prediction.perturbation:
            assert value(a, name, p) == pytest.approx(value(b, name, p), rel=1e-5), name
    p = prediction.perturbation[0]
    assert value(b, "effect_size_ratio", p) == pytest.approx(2 * value(a, "effect_size_ratio", p), rel=1e-5)


def test_chance(world: World, truth: Truth) -> None:
    """Random effects: half right in ranks and signs, no correlation, precision at prevalence."""
    rng = np.random.default_rng(9)
    c = world.control()
    correlations = ("pearson_delta_ctrl_disjoint", "pearson_delta_ctrl", "cosine")
    wanted = select_metrics((*correlations, "pds_l1", "pds_cosine", "de_direction", "de_pr_auc"))
    tables = []
    for _ in range(60):
        random = {p: c + rng.normal(0, 1, len(c)) for p in world.tested()}
        tables.append(score_prediction(truth, prediction_of(random, world.genes), metrics=wanted))
    table = pd.concat(tables)
    mean = table.groupby("metric")["value"].mean()
    error = table.groupby("metric")["value"].std() / np.sqrt(60)  # perturbations share a draw: count draws only
    for name in ("pds_cosine", "de_direction"):
        assert abs(mean[name] - 0.5) < 4 * error[name], name
    assert abs(mean["pds_l1"] - 0.5) < 0.06
    for name in correlations:
        assert abs(mean[name]) < 4 * error[name], name
    prevalence = np.mean([case.differential.significant().mean() for case in cases(truth, world.additive())])
    assert mean["de_pr_auc"] == pytest.approx(prevalence, abs=0.1)


def test_shared_control_noise_inflates_and_disjoint_does_not(tmp_path: Path) -> None:
    """With few control cells and no effect at all, the shared score is far above 0 and the disjoint one is not."""
    shared, disjoint = [], []
    for seed in range(12):
        world = make_world(tmp_path / str(seed), seed=seed, n_control=8, effect=0.0)
        spec = EvaluationSpec(metrics=("pearson_delta_ctrl", "pearson_delta_ctrl_disjoint"))
        truth = load_truth(world.prepared, world.split, spec)
        singles = {d: world.cells(genes_of(d)[0], ("train", "val")).mean(0) for d in world.tested()}
        mean = score_prediction(truth, prediction_of(singles, world.genes)).groupby("metric")["value"].mean()
        shared.append(mean["pearson_delta_ctrl"])
        disjoint.append(mean["pearson_delta_ctrl_disjoint"])
    assert np.mean(shared) > 0.6
    assert abs(np.mean(disjoint)) < 0.15


# --- ties and undefined scores ------------------------------------------------------------------------------------


def test_mid_ranks() -> None:
    assert mid_rank_score(np.array([1.0, 2.0, 3.0]), 0) == 1
    assert mid_rank_score(np.array([1.0, 2.0, 3.0]), 1) == 0.5
    assert mid_rank_score(np.array([1.0, 2.0, 3.0]), 2) == 0
    assert mid_rank_score(np.ones(5), 3) == 0.5
    assert mid_rank_score(np.array([1.0, 1.0, 2.0]), 0) == 0.75
    with pytest.raises(Undefined, match="no other test perturbation"):
        mid_rank_score(np.array([1.0]), 0)


def test_correlation_of_a_constant_is_undefined() -> None:
    a = np.array([1.0, 2.0, 4.0])
    with pytest.raises(Undefined, match="predicted effect is constant"):
        correlate(a, np.full(3, 0.7) + 1e-9 * a, 1.0)
    with pytest.raises(Undefined, match="observed effect is constant"):
        correlate(np.zeros(3), a, 1.0)
    assert correlate(a, -a, 1.0) == pytest.approx(-1)
    assert correlate(a, a * 100 * ROUNDING, 1.0) == pytest.approx(1)  # small, yet no rounding


def test_no_change_has_no_direction(world: World, truth: Truth) -> None:
    stored = world.control().astype(np.float32)  # as a prediction file keeps it
    table = score_prediction(truth, prediction_of(dict.fromkeys(world.tested(), stored), world.genes))
    undefined = {
        "pearson_delta_ctrl": "the predicted effect is constant over genes",
        "pearson_delta_ctrl_disjoint": "the predicted effect is constant over genes",
        "pearson_delta_ctrl_top_de": "the predicted effect is constant over genes",
        **dict.fromkeys(("cosine", "pds_cosine", "de_overlap", "de_direction", "de_pr_auc"), "no effect predicted"),
        "rmse_relative_sampled": "the method gives no sampled cells",
    }
    for name in METRICS:
        rows = table[table.metric == name]
        if name in undefined:
            assert rows["value"].isna().all() and set(rows["reason"]) == {undefined[name]}, name
        else:
            assert rows["value"].notna().all(), name
    assert table[table.metric == "pds_l1"]["value"].mean() == pytest.approx(0.5)
    np.testing.assert_allclose(table[table.metric == "effect_size_ratio"]["value"], 0, atol=1e-5)


def test_mean_effect_has_nothing_against_the_perturbed_mean(world: World, truth: Truth) -> None:
    stored = world.trained_mean().astype(np.float32)
    table = score_prediction(truth, prediction_of(dict.fromkeys(world.tested(), stored), world.genes))
    rows = table[table.metric == "pearson_delta_pert"]
    assert rows["value"].isna().all() and set(rows["reason"]) == {"the predicted effect is constant over genes"}
    assert table[table.metric == "r2_delta_weighted"]["value"].max() < 1e-6


def test_null_of_the_distribution_metrics(tmp_path: Path) -> None:
    """Perturbations that do nothing, predicted as no change: control against control, about 0."""
    world = make_world(tmp_path, effect=0.0, n_cells=60, n_control=240)
    spec = EvaluationSpec(metrics=("e_distance", "mmd_rbf", "de_overlap"))
    truth = load_truth(world.prepared, world.split, spec)
    table = score_prediction(truth, prediction_of(dict.fromkeys(world.tested(), world.control()), world.genes))
    for metric, scale in (("e_distance", 0.1), ("mmd_rbf", 0.01)):
        values = table[table.metric == metric]["value"]
        assert abs(values.mean()) < scale
        assert (values < 0).any()
    assert set(table[table.metric == "de_overlap"]["reason"]) <= {
        "no gene is significant in the truth",
        "no effect predicted",
    }
