"""The summary tables: what they hold, that nothing is lost, and that equal inputs give equal bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbed.config import StatisticsSpec
from perturbed.data.contracts import SCORE_COLUMNS, read_scores, write_scores
from perturbed.errors import ConfigError, DataError
from perturbed.evaluation.registry import METRICS
from perturbed.evaluation.statistics import arrange, holm
from perturbed.evaluation.summarise import TABLES, merge_scores, summarise, tabulate_means

DIRECTIONS = {"corr": 1, "error": -1}
SPEC = StatisticsSpec(
    primary_metric="corr",
    primary_method="model",
    primary_baseline="additive",
    baselines=("no_change", "mean_effect", "additive"),
    n_bootstrap=200,
)
LEVELS = {
    "no_change": 0.0, "mean_effect": 0.4, "additive": 0.6, "model": 0.7, "technical_duplicate": 0.85,
    "interpolated_duplicate": 0.9, "truth": 1.0,
}  # fmt: skip


def make_scores(methods=tuple(LEVELS), dataset: str = "d") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = [f"A{i}+B{j}" for i in range(4) for j in range(4)]
    noise = {name: rng.normal(0, 0.05) for name in names}
    rows = []
    for method in methods:
        for seed in range(3 if method == "model" else 1):
            for i, name in enumerate(names):
                quality = LEVELS[method] + (method != "truth") * (noise[name] + 0.01 * seed)
                for metric in DIRECTIONS:
                    undefined = method == "no_change" and metric == "corr"
                    value = np.nan if undefined else quality if metric == "corr" else 1 - quality
                    reason = "no direction" if undefined else ""
                    key = (dataset, "s", 0, method, seed, "all", name, f"combo_seen{1 + i % 2}", 40, 1.0 + i)
                    rows.append((*key, metric, value, reason))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    for method in ("additive", "model", "no_change", "mean_effect"):
        write_scores(folder / f"{method}.parquet", make_scores([method]))
    references = ["technical_duplicate", "interpolated_duplicate", "truth"]
    write_scores(folder / "references.parquet", make_scores(references))
    summarise(sorted(folder.glob("*.parquet")), SPEC, folder / "out", DIRECTIONS)
    return folder / "out"


def read(tables, name: str) -> pd.DataFrame:
    return pd.read_csv(tables / f"{name}.csv")


def test_all_tables_are_there_and_the_merged_scores_keep_every_row(tables):
    assert sorted(path.name for path in tables.iterdir()) == sorted(
        [*(f"{name}.csv" for name in TABLES), "scores.parquet"]
    )
    merged = read_scores(tables / "scores.parquet")
    assert len(merged) == len(make_scores())


def test_summary_holds_means_floor_ceiling_and_normalised_scores(tables):
    table = read(tables, "summary").set_index(["method", "metric"])
    model = table.loc["model", "corr"]
    scores = make_scores(["model"]).query("metric == 'corr'")
    assert model["mean"] == pytest.approx(scores["value"].mean(), rel=1e-5)
    assert model["sd_over_seeds"] == pytest.approx(0.01, rel=1e-4)
    assert model["ci_low"] < model["mean"] < model["ci_high"]
    assert (model["floor_method"], model["n_seeds"], model["n_perturbations"]) == ("mean_effect", 3, 16)
    assert model["normalised"] == pytest.approx((0.71 - 0.4) / (0.85 - 0.4), rel=1e-4)
    assert table.loc[("truth", "corr"), "reference"]
    assert table.loc[("model", "error"), "normalised"] == pytest.approx(model["normalised"], rel=1e-4)
    missing = table.loc["no_change", "corr"]
    assert np.isnan(missing["mean"]) and missing["n_undefined"] == 16


def test_contrasts_mark_the_primary_and_adjust_it_alone(tables):
    table = read(tables, "contrasts")
    primary = table[table["primary"]]
    assert len(primary) == 1
    row = primary.iloc[0]
    assert (row["method"], row["baseline"], row["metric"], row["family"]) == ("model", "additive", "corr", "primary")
    assert row["family_size"] == 1 and row["p_holm"] == row["p"]
    assert row["difference"] == pytest.approx(0.11, abs=1e-5)
    for baseline, family in table[~table["primary"]].groupby("family"):
        assert set(family["baseline"]) == {baseline}
        np.testing.assert_allclose(family["p_holm"], holm(family["p"].to_numpy()), rtol=1e-4)
    assert not set(table["method"]) & {"technical_duplicate", "interpolated_duplicate", "truth"}
    assert (table["method"] != table["baseline"]).all()
    assert len(table) == 3 * 3 * 2  # each of the other methods against each baseline on each metric


def test_undefined_contrasts_are_kept_and_say_how_many_were_left_out(tables):
    table = read(tables, "contrasts").set_index(["method", "baseline", "metric"])
    row = table.loc["model", "no_change", "corr"]
    assert np.isnan(row["difference"]) and row["n_perturbations"] == 0 and row["n_left_out"] == 16


def test_undefined_scores_are_listed_with_their_reason(tables):
    table = read(tables, "undefined")
    assert len(table) == 1
    assert table.iloc[0].to_dict() == {
        "dataset": "d", "split": "s", "method": "no_change", "metric": "corr", "reason": "no direction",
        "count": 16, "n_perturbations": 16,
    }  # fmt: skip


def test_calibration_is_the_share_of_the_range_a_duplicate_covers(tables):
    table = read(tables, "calibration").set_index(["metric", "positive"])
    row = table.loc["corr", "interpolated_duplicate"]
    scores = make_scores().query("metric == 'corr'").groupby("method")["value"].mean()
    low = scores["mean_effect"]
    expected = (scores["interpolated_duplicate"] - low) / (scores["truth"] - low)
    assert row["drf"] == pytest.approx(expected, rel=1e-4)
    assert row["drf_low"] < row["drf"] < row["drf_high"]


def test_strata_cover_every_perturbation_once_per_kind(tables):
    table = read(tables, "strata").query("method == 'model' and metric == 'corr'")
    assert set(table["kind"]) == {"effect_size", "subgroup"}
    for _, part in table.groupby("kind"):
        assert part["n_perturbations"].sum() == 16
    assert table["difference"].to_numpy() == pytest.approx(0.11, abs=1e-4)


def test_perturbations_average_over_seeds(tables):
    table = read(tables, "perturbations").query("method == 'model'")
    raw = make_scores(["model"]).query("metric == 'corr'").groupby("perturbation")["value"].mean()
    np.testing.assert_allclose(table.set_index("perturbation")["value"], raw, rtol=1e-5)
    assert (table["n_scores"] == 3).all()


def test_equal_inputs_give_equal_bytes_whatever_the_order_of_files_and_rows(tmp_path):
    first, second = make_scores(["additive", "model"]), make_scores(["mean_effect", "no_change", "truth"])
    for run, (a, b) in {"x": (first, second), "y": (second.iloc[::-1], first.sample(frac=1, random_state=0))}.items():
        (tmp_path / run).mkdir()
        write_scores(tmp_path / run / "1.parquet", a)
        write_scores(tmp_path / run / "2.parquet", b)
        summarise(
            [tmp_path / run / "1.parquet", tmp_path / run / "2.parquet"], SPEC, tmp_path / run / "out", DIRECTIONS
        )
    for path in sorted((tmp_path / "x" / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "y" / "out" / path.name).read_bytes(), path.name


def test_rows_that_several_files_share_stand_once_and_contradictions_are_refused(tmp_path):
    table = make_scores(["truth"])
    write_scores(tmp_path / "a.parquet", table)
    write_scores(tmp_path / "b.parquet", table)
    assert len(merge_scores([tmp_path / "a.parquet", tmp_path / "b.parquet"])) == len(table)
    write_scores(tmp_path / "b.parquet", table.assign(value=0.5))
    with pytest.raises(DataError, match="two files disagree on truth seed 0"):
        merge_scores([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_a_metric_of_the_whole_test_set_does_not_count_as_a_perturbation(tmp_path):
    table = make_scores()
    whole = table.groupby("method", as_index=False).first().assign(perturbation="", metric="set", effect_size=np.nan)
    whole = whole.assign(subgroup="", value=0.5, reason="")[list(SCORE_COLUMNS)]
    write_scores(tmp_path / "a.parquet", pd.concat([table, whole]))
    summarise([tmp_path / "a.parquet"], SPEC, tmp_path / "out", {**DIRECTIONS, "set": 1})
    summary = read(tmp_path / "out", "summary").set_index(["method", "metric"])
    assert summary.loc[("model", "corr"), "n_undefined"] == 0
    assert summary.loc[("model", "set"), "mean"] == 0.5 and np.isnan(summary.loc[("model", "set"), "ci_low"])
    strata = read(tmp_path / "out", "strata")
    assert "set" not in set(strata["metric"])


def test_an_unscored_primary_metric_and_an_empty_table_are_refused(tmp_path):
    write_scores(tmp_path / "a.parquet", make_scores(["model"]))
    spec = SPEC.model_copy(update={"primary_metric": "cor"})
    with pytest.raises(ConfigError, match="'cor' was not scored; did you mean 'corr'"):
        summarise([tmp_path / "a.parquet"], spec, tmp_path / "out", DIRECTIONS)
    assert not (tmp_path / "out").exists()
    write_scores(tmp_path / "b.parquet", make_scores(["model"]).iloc[:0])
    with pytest.raises(DataError, match="no score in any file"):
        merge_scores([tmp_path / "b.parquet"])


def test_a_run_without_the_primary_method_says_so(tmp_path, caplog):
    write_scores(tmp_path / "a.parquet", make_scores(["additive", "mean_effect"]))
    summarise([tmp_path / "a.parquet"], SPEC, tmp_path / "out", DIRECTIONS)
    assert "no primary contrast, because model was not scored" in caplog.text


def test_an_interval_ends_where_its_metric_does(tmp_path):
    high = make_scores(["model"]).query("metric == 'corr'").head(6).assign(metric="pearson_delta_ctrl")
    high["value"] = [0.99, 1.0, 0.7, 1.0, 0.999, 1.0]
    summary = tabulate_means(list(arrange(high, SPEC)), SPEC, {"pearson_delta_ctrl": 1}).iloc[0]
    free = tabulate_means(list(arrange(high.assign(metric="corr"), SPEC)), SPEC, {"corr": 1}).iloc[0]
    assert free["ci_high"] > 1.0 == summary["ci_high"]
    assert summary["ci_low"] == free["ci_low"] < summary["mean"] == free["mean"]


def test_bounds_of_metrics_are_read_from_their_ranges():
    bounds = {name: metric.bounds for name, metric in METRICS.items()}
    assert bounds["pearson_delta_ctrl"] == (-1.0, 1.0) and bounds["l2_delta"] == (0.0, np.inf)
    assert all(low < high for low, high in bounds.values())
    assert all(metric.perfect <= metric.bounds[1] for metric in METRICS.values())
