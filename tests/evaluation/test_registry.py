"""The registry: complete entries, one door for new metrics, and a reference page that does not drift."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_world import make_world

from perturbed.config import EvaluationSpec
from perturbed.errors import ConfigError
from perturbed.evaluation.case import Case
from perturbed.evaluation.evaluate import evaluate
from perturbed.evaluation.registry import METRICS, Undefined, metric, reference_page, select_metrics

ROOT = Path(__file__).parents[2]


def test_every_entry_is_complete() -> None:
    for name, entry in METRICS.items():
        assert entry.name == name and entry.direction in (-1, 0, 1)
        for text in (entry.summary, entry.formula, entry.range, entry.chance, entry.floor, entry.ceiling, entry.source):
            assert text.strip(), name
        doc = entry.function.__doc__ or ""
        for label in ("Formula:", "Direction:", "Range:", "Chance:", "Floor:", "Ceiling:", "Source:"):
            assert label in doc, (name, label)


def test_the_metrics_of_the_issue_are_there() -> None:
    wanted = {
        *("rmse", "mae", "l2_delta", "rmse_relative", "rmse_relative_sampled", "r2_published", "r2", "r2_cells"),
        *("pearson_delta_ctrl", "pearson_delta_ctrl_disjoint", "pearson_delta_pert", "wmse", "r2_delta_weighted"),
        *("cosine", "pds_l1", "pds_cosine", "centroid_accuracy", "de_overlap", "de_direction", "de_pr_auc"),
        *("e_distance", "mmd_rbf", "mmd_published", "effect_size_ratio", "spread_ratio"),
        *("rmse_top_de", "pearson_delta_ctrl_top_de", "r2_top_de"),
    }
    assert wanted == set(METRICS)


def test_selection() -> None:
    assert [m.name for m in select_metrics(("rmse", "mae"))] == [n for n in METRICS if n in ("rmse", "mae")]
    assert len(select_metrics("all")) == len(select_metrics(("all",))) == len(METRICS)
    with pytest.raises(
        ConfigError, match=r"unknown metric 'pearson_delta_contrl'; did you mean 'pearson_delta_ctrl'\?"
    ):
        select_metrics(("pearson_delta_contrl",))


@pytest.fixture
def own_metric() -> Iterator[str]:
    @metric(
        formula="max |x̂ − x|", direction=-1, range="[0, ∞)", perfect=0.0, chance="none", floor="no_change",
        ceiling="truth", level="mean", topic="Own", source="a user",
    )  # fmt: skip
    def worst_gene(case: Case) -> float:
        """Largest error over genes."""
        if case.truth.key(case.index)[0] == "g0+g1":
            raise Undefined("not this one")
        return float(np.abs(case.predicted - case.observed).max())

    yield "worst_gene"
    del METRICS["worst_gene"]


def test_one_entry_adds_a_metric(tmp_path: Path, own_metric: str) -> None:
    world = make_world(tmp_path)
    prediction = world.additive()
    table = evaluate(world.prepared, world.split, prediction, EvaluationSpec(metrics=(own_metric,)))
    assert list(table["metric"].unique()) == [own_metric]
    for p, hat in zip(prediction.perturbation, prediction.mean):
        row = table[table.perturbation == p].iloc[0]
        if p == "g0+g1":
            assert np.isnan(row["value"]) and row["reason"] == "not this one"
        else:
            assert row["value"] == pytest.approx(np.abs(hat - world.cells(p, "test").mean(0, dtype=float)).max())
    assert "## Own" in reference_page() and "worst_gene" in reference_page()


def test_a_name_is_registered_once(own_metric: str) -> None:
    def worst_gene(case: Case) -> float:
        """Another."""
        return 0.0

    texts = dict.fromkeys(("formula", "range", "chance", "floor", "ceiling", "topic", "source"), "t")
    fields = {**texts, "direction": 1, "perfect": 1.0, "level": "mean"}
    with pytest.raises(ConfigError, match="registered twice"):
        metric(**fields)(worst_gene)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no docstring"):
        metric(**fields)(lambda case: 0.0)  # type: ignore[arg-type]


def test_the_reference_page_has_every_metric() -> None:
    page = reference_page()
    for name in METRICS:
        assert f"### {name}\n" in page
