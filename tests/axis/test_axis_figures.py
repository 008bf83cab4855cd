"""Figures and verbs of axis cases: picture and numbers, equal bytes, and what is missing is named."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import typer
from scored_case import BETA, SPEC
from typer.testing import CliRunner

from perturbed.cli_axis import axis_app, score_genes
from perturbed.errors import ConfigError, DataError
from perturbed.figures.axis import TABLES, draw_axis_figure


@pytest.mark.parametrize("kind", TABLES)
def test_figures_are_drawn_with_their_numbers(tables, tmp_path, kind):
    for name in ("a", "b"):
        draw_axis_figure(kind, tables, tmp_path / name / kind, title="Simulated islets")
    one, other = tmp_path / "a", tmp_path / "b"
    for suffix in ("svg", "png", "csv"):
        assert (one / f"{kind}.{suffix}").read_bytes() == (other / f"{kind}.{suffix}").read_bytes()
    text = re.sub(r"\s+", " ", (one / f"{kind}.svg").read_text())
    expected = {
        "scores": ["Ins1", "Stability", "planted among", "permuted within studies"],
        "flow": ["Ins1 raised in", "Ins1 lowered in", "Ins1 lowered: principal components of all cells", "→ normal"],
        "map": ["type B pancreatic cell", "type 2 diabetes mellitus", "arrows: Ins1 raised", "arrows: Ins1 lowered"],
        "umap": ["type B pancreatic cell", "normal"],
    }
    for words in expected[kind]:
        assert words in text, words
    source = pd.read_csv(one / f"{kind}.csv", low_memory=False)
    assert set(TABLES[kind]) - {"axes"} <= set(source["table"])


def test_one_group_and_one_flow_can_be_drawn(tables, tmp_path):
    draw_axis_figure("scores", tables, tmp_path / "beta", group=BETA)
    assert "Composition" not in (tmp_path / "beta.svg").read_text()
    draw_axis_figure("flow", tables, tmp_path / "flow", flows=["Ins1_down"])
    assert "Ins1 raised in" not in (tmp_path / "flow.svg").read_text()  # the told direction


def test_what_is_missing_is_named(tables, tmp_path):
    with pytest.raises(ConfigError, match="no kind 'score'; did you mean 'scores'"):
        draw_axis_figure("score", tables, tmp_path / "x")
    with pytest.raises(DataError, match="no group 'beta'"):
        draw_axis_figure("scores", tables, tmp_path / "x", group="beta")
    with pytest.raises(DataError, match="no flow 'Ins1'; did you mean"):
        draw_axis_figure("flow", tables, tmp_path / "x", flows=["Ins1"])
    with pytest.raises(DataError, match=r"no gene_scores.csv; make the folder with `perturbed score-genes`"):
        draw_axis_figure("scores", tmp_path, tmp_path / "x")


def test_verbs_write_tables_and_figures(world, tmp_path):
    app = typer.Typer()
    app.command("score-genes")(score_genes)
    app.add_typer(axis_app, name="axis")
    spec = SPEC | {"judged": [BETA], "n_cells": 40, "groups": "cell_type"}
    options = ["--cells", world.cells, "--model", world.model, "--spec", json.dumps(spec), "--out", tmp_path / "t"]
    result = CliRunner().invoke(app, ["score-genes", *map(str, options), "--truth", str(world.truth)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "t" / "planted.csv").is_file()
    record = json.loads((tmp_path / "t.provenance.json").read_text())
    assert record["verb"] == "score-genes" and record["inputs"]["cells"]["sha256"]
    result = CliRunner().invoke(
        app, ["axis", "draw", "umap", "--tables", str(tmp_path / "t"), "--out", str(tmp_path / "u")]
    )
    assert result.exit_code == 0 and (tmp_path / "u.svg").is_file()
