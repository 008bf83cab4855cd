"""The command line: one clear line for every mistake, help for every verb, records beside outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERBS = ("fetch", "fetch-file", "mirror", "simulate", "prepare", "split", "features", "check-leakage", "fit", "predict",
         "evaluate", "summarise", "figure", "config", "longest", "report")  # fmt: skip
FIT = ["fit", "--prepared", "a", "--split", "b", "--features", "c", "--method", "{}", "--out", "x"]
STUDY_VERBS = ("tabulate", "probe", "programs", "identify", "map", "gather", "draw")


def perturbed(*arguments, cwd=ROOT, **options):
    call = [sys.executable, "-m", "perturbed.cli", *map(str, arguments)]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, **options)


def test_every_verb_explains_itself():
    from typer.testing import CliRunner

    from perturbed.cli import app

    for verb in [*((name,) for name in VERBS), *(("study", name) for name in STUDY_VERBS)]:
        shown = CliRunner().invoke(app, [*verb, "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "--resolve", '{"seedz": [1]}'], "did you mean 'seeds'?"),
        (["config", "--resolve", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            ["features", "--prepared", "no.h5ad", "--split", "no.csv", "--spec", "{}", "--out", "x.csv"],
            "no.h5ad: no such file",
        ),
        (
            ["fetch", "--dataset", "x", "--card", '{"source": {"kind": "urls"}}', "--out", "x"],
            "--card: source: `kind` must be",
        ),
        (
            ["fetch", "--dataset", "x", "--card", '{"source": {"kind": "path", "path": "no.h5ad"}}', "--out", "x"],
            "no.h5ad",
        ),
        (["evaluate", "--truth", "a", "--split", "b"], "give either --prediction FILE or --references"),
        (["summarise", "no.parquet", "--out", "x"], "no.parquet: no such file"),
        (["figure", "overwiev", "--out", "x"], "overwiev"),
        (
            ["study", "draw", "--table", "no.csv", "--spec", "{kind: wep}", "--out", "x"],
            "`kind` must be one of comparison",
        ),
        (
            [
                "study",
                "map",
                "--prepared",
                "a",
                "--split",
                "b",
                "--features",
                "c",
                "--model",
                "d",
                "--out",
                "x",
                "--spec",
                "{kind: latent_map, dataset: d, split: s, methods: m}",
            ],
            "--model: 'd' is not METHOD@SEED=PATH",
        ),
        (["longest", "--results", "nowhere"], "nowhere: no benchmark file"),
        ([*FIT, "--file", "sets.gmt"], "--file sets.gmt: give ROLE=PATH, such as gene_sets=sets.gmt"),
        ([*FIT, "--file", "gene_sets="], "--file gene_sets=: give ROLE=PATH"),
        (
            [*FIT, "--file", "gene_sets=no.gmt"],
            "--file gene_sets=no.gmt: no such file; correct the path, or the card's files.gene_sets",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, tmp_path):
    done = perturbed(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("perturbed: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_truncated_h5ad_is_named(tmp_path):
    (tmp_path / "prepared.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp_path / "split.csv").write_text("")
    spec = ["--spec", '{"kind": "unseen_combo"}']
    done = perturbed(
        "split", "--dataset", "d", "--name", "s", "--prepared", "prepared.h5ad", *spec, "--out", "s.csv", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "prepared.h5ad: not a readable h5ad" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resolved_config_has_every_default(tmp_path):
    done = perturbed("config", "--resolve", '{"dataset": "simulation"}', "--out", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    import yaml

    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert resolved["dataset"] == ["simulation"]
    assert resolved["statistics"]["n_bootstrap"] == 2000


def test_an_interrupt_is_one_line(tmp_path):
    """SIGTERM, a scheduler's polite end, is handled as Ctrl-C is."""
    card = json.dumps({"source": {"kind": "simulation", "generator": "scm", "params": {"n_truth_cells": 200_000}}})
    call = [sys.executable, "-m", "perturbed.cli", "simulate", "--dataset", "d", "--card", card]
    call += ["--out", str(tmp_path / "raw.h5ad"), "--truth", str(tmp_path / "truth.h5ad")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    assert "stopped by SIGTERM" in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
