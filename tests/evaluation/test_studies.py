"""Tables of the studies against slow, obvious references computed from the scores themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbed.config import StatisticsSpec, parse
from perturbed.data.contracts import SCORE_COLUMNS, Features, write_features, write_scores
from perturbed.errors import ConfigError, DataError
from perturbed.evaluation.studies import StudyInputs, read_published, tabulate_study
from perturbed.study_config import TOP_EXPRESSED, Comparison, Conditions, Denoising, Sweep

SPEC = StatisticsSpec(n_bootstrap=200)
NAMES = [f"A{i}+B{j}" for i in range(4) for j in range(3)]
LEVELS = {"mean_effect": 0.4, "additive": 0.6, "model": 0.7, "small": 0.5, "technical_duplicate": 0.9, "truth": 1.0,
          "noise_free_additive": 0.8}  # fmt: skip
SEEDS = {"model": 3, "small": 2}


def make_scores(split: str = "double", shift: float = 0.0, folds: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(len(split))
    rows = []
    for method, level in LEVELS.items():
        gain = shift if method in ("model", "noise_free_additive") else 0.0
        for seed in range(SEEDS.get(method, 1)):
            for fold in range(folds):
                for name in NAMES:
                    for metric in ("r2", "r2_top_de", "l2_delta"):
                        value = level + gain + rng.normal(0, 0.03)
                        value = 3 * (1 - value) if metric == "l2_delta" else value
                        key = ("d", split, fold, method, seed, "all", name, "combo_seen2", 40, 1.0)
                        rows.append((*key, metric, value, ""))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_scores(tmp_path / "double.parquet", make_scores())
    return [tmp_path / "double.parquet"]


def comparison(**changes: object) -> Comparison:
    value = {"kind": "comparison", "title": "t", "splits": ["double"], "methods": ["additive", "model"],
             "metrics": ["l2_delta", "r2"], **changes}  # fmt: skip
    return parse(Comparison, value, "study")


def row(table: pd.DataFrame, **equal: object) -> pd.Series:
    for key, value in equal.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_a_comparison_has_the_mean_of_its_scores(paths):
    table = tabulate_study(paths, comparison(), SPEC)
    scores = make_scores()
    for method in ("additive", "model", "technical_duplicate"):
        for metric in ("l2_delta", "r2"):
            mine = scores[(scores["method"] == method) & (scores["metric"] == metric)]
            found = row(table, method=method, metric=metric)
            assert found["mean"] == pytest.approx(np.mean(mine["value"]))
            by_seed = [np.mean(mine["value"][mine["seed"] == seed]) for seed in sorted(set(mine["seed"]))]
            if len(by_seed) > 1:
                assert found["sd_over_seeds"] == pytest.approx(np.std(by_seed, ddof=1))
            assert found["ci_low"] <= found["mean"] <= found["ci_high"]


def test_a_comparison_shows_its_methods_and_the_floor_of_another(paths):
    table = tabulate_study(paths, comparison(), SPEC)
    assert set(table["method"][~table["reference"]]) == {"additive", "model"}
    scores = make_scores()
    floor = scores["value"][(scores["method"] == "mean_effect") & (scores["metric"] == "r2")].mean()
    assert row(table, method="model", metric="r2")["floor"] == pytest.approx(floor)
    assert row(table, method="model", metric="r2")["floor_method"] == "mean_effect"


def test_published_numbers_stand_beside_the_same_method_split_and_metric(paths, tmp_path):
    published = tmp_path / "published.csv"
    published.write_text(
        "# a comment\nitem,method,split,metric,value,sd,source\n"
        "paper_a_table3,additive|other,double,l2_delta,2.5,0.1,A\n"
        "paper_a_table2,model,double,l2_delta,9,,A\n"
        "paper_a_table3,model,single,l2_delta,8,,A\n"
    )
    study = comparison(answers=["paper_a_table3"])
    table = tabulate_study(paths, study, SPEC, StudyInputs(published=published))
    found = row(table, method="additive", metric="l2_delta")
    assert (found["published"], found["published_sd"], found["source"]) == (2.5, 0.1, "A")
    assert table["published"].notna().sum() == 1
    assert set(read_published(published)["method"]) == {"additive", "other", "model"}
    published.write_text("item,method\n")
    with pytest.raises(DataError, match="column 'split' is missing"):
        tabulate_study(paths, study, SPEC, StudyInputs(published=published))


def test_a_metric_that_was_not_scored_is_named(paths):
    with pytest.raises(ConfigError, match="metric 'r2_cells' was not scored; "):
        tabulate_study(paths, comparison(metrics=["r2_cells"]), SPEC)


def test_the_most_expressed_genes_are_those_of_the_training_cells(paths, tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(30)]
    mean = pd.Series(rng.permutation(30).astype(float), index=pd.Index(genes, name="gene"))
    header = {"split_sha256": "0" * 64, "upstream": False, "spec": {}, "n_cells": 10}
    table = pd.DataFrame({"mean": mean, "sd": 1.0, "pc1": 0.1, "pc2": 0.1})
    write_features(tmp_path / "features.csv", Features(table, header))
    blocks = []
    for name in NAMES:
        observed = rng.normal(size=30)
        block = {"perturbation": name, "context": "all", "gene": genes, "observed": observed}
        blocks.append(pd.DataFrame({**block, "predicted": observed + rng.normal(size=30)}))
    deltas = pd.concat(blocks).assign(dataset="d", split="double", fold=0, method="model", seed=0)
    (tmp_path / "details").mkdir()
    deltas.to_parquet(tmp_path / "details/deltas.parquet")
    inputs = StudyInputs(details=[tmp_path / "details", tmp_path / "features.csv"])
    found = tabulate_study(paths, comparison(top_expressed=12), SPEC, inputs)
    top = [gene for gene in genes if mean[gene] >= 18]
    expected = []
    for name in NAMES:
        here = deltas[(deltas["perturbation"] == name) & deltas["gene"].isin(top)]
        expected.append(np.corrcoef(here["observed"], here["predicted"])[0, 1])
    assert row(found, method="model", metric=TOP_EXPRESSED)["mean"] == pytest.approx(np.mean(expected))


def test_conditions_average_over_seeds_and_folds(tmp_path):
    scores = make_scores(folds=2)
    write_scores(tmp_path / "scores.parquet", scores)
    study = parse(Conditions, {"kind": "conditions", "title": "t", "splits": ["double"], "methods": ["model"]}, "study")
    table = tabulate_study([tmp_path / "scores.parquet"], study, SPEC)
    assert list(table["perturbation"]) == sorted(NAMES)
    for name in NAMES[:3]:
        mine = scores[(scores["method"] == "model") & (scores["perturbation"] == name)]
        assert row(table, perturbation=name)["x"] == pytest.approx(mine["value"][mine["metric"] == "r2"].mean())
        assert row(table, perturbation=name)["y"] == pytest.approx(mine["value"][mine["metric"] == "r2_top_de"].mean())


def test_a_sweep_keeps_the_order_of_its_levels_and_ends_with_the_last_epoch(paths, tmp_path):
    histories = []
    for method, level in (("model", 2.0), ("small", 1.0)):
        for seed in range(2):
            path = tmp_path / f"{method}{seed}.csv"
            rows = [("d", "double", 0, method, seed, epoch, "kl_iota", level * epoch + seed) for epoch in range(4)]
            columns = ["dataset", "split", "fold", "method", "seed", "epoch", "term", "value"]
            pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
            histories.append(path)
    study = parse(
        Sweep,
        {"kind": "sweep", "title": "t", "splits": ["double"], "factor": "size", "levels": {"small": 7, "model": 3},
         "metrics": ["r2"], "history": ["kl_iota"], "baselines": ["additive"]},
        "study",
    )  # fmt: skip
    table = tabulate_study(paths, study, SPEC, StudyInputs(histories=histories))
    scored = table[(table["quantity"] == "score") & table["order"].notna()].sort_values("order")
    assert list(scored["level"]) == ["7", "3"]
    assert row(table, method="additive", quantity="score")["level"] == ""
    last = row(table, method="model", quantity="history")
    assert (last["mean"], last["ci_low"], last["ci_high"], last["n_seeds"]) == (6.5, 6.0, 7.0, 2)
    with pytest.raises(ConfigError, match="no term 'kl_iot'"):
        tabulate_study(paths, study.model_copy(update={"history": ("kl_iot",)}), SPEC, StudyInputs(histories=histories))


def test_a_gain_that_is_denoising_falls_with_the_number_of_cells(tmp_path):
    """Planted: the model gains 0.1 with few cells and none with many; a constant reference gains 0.2 at both."""
    paths = []
    for split, shift in (("few", 0.0), ("many", -0.1)):
        write_scores(tmp_path / f"{split}.parquet", make_scores(split, shift))
        paths.append(tmp_path / f"{split}.parquet")
    study = parse(
        Denoising,
        {"kind": "denoising", "title": "t", "levels": {"few": 5, "many": 40}, "methods": ["model"],
         "metrics": ["r2", "l2_delta"]},
        "study",
    )  # fmt: skip
    table = tabulate_study(paths, study, SPEC)
    over_reference = table[table["baseline"] == "noise_free_additive"]
    table = table[table["baseline"] == "additive"]
    few, many = (row(table, method="model", metric="r2", cells=cells) for cells in (5, 40))
    assert few["gain"] == pytest.approx(0.1, abs=0.05) and few["ci_low"] > 0
    assert many["gain"] == pytest.approx(0.0, abs=0.05) and many["ci_low"] < 0 < many["ci_high"]
    scores = make_scores("few")
    mean = scores[scores["metric"] == "l2_delta"].groupby("method")["value"].mean()
    distance = row(table, method="model", metric="l2_delta", cells=5)
    assert distance["gain"] == pytest.approx(mean["additive"] - mean["model"])
    assert bool(row(table, method="noise_free_additive", metric="r2", cells=5)["reference"])
    for method in ("model", "additive"):
        found = row(over_reference, method=method, metric="l2_delta", cells=5)
        assert found["gain"] == pytest.approx(mean["noise_free_additive"] - mean[method])
        assert found["ci_low"] < found["gain"] < found["ci_high"] < 0
