"""The DAG end to end on a tiny screen: complete, idempotent, precise and the same twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from pipeline import ROOT, Run

from perturbed.plan import RUN_FIGURES, SPLIT_FIGURES

pytestmark = pytest.mark.workflow


def test_every_promised_file_is_there(finished_run: Run):
    results = finished_run.folder / "results"
    assert (results / "report.html").stat().st_size > 100_000
    fit = results / "tiny/zero_shot/fold0/perturbedvae/seed1"
    for name in ("model/state.pt", "model/config.json", "training.csv", "prediction.h5ad", "scores.parquet"):
        assert (fit / name).is_file(), name
    for study in ("double", "alignment"):
        assert (results / f"studies/{study}/table.csv").stat().st_size > 0
    for figure in ("overview", "calibration", "studies/double", "studies/alignment"):
        for suffix in ("svg", "png", "csv"):
            assert (results / f"figures/{figure}.{suffix}").stat().st_size > 0
    assert not list(finished_run.folder.glob("**/*.part.*"))


def test_provenance_lies_beside_every_result(finished_run: Run):
    record = json.loads(
        (finished_run.folder / "results/tiny/zero_shot/fold0/additive/seed0/model.provenance.json").read_text()
    )
    assert record["verb"] == "fit"
    assert record["versions"]["torch"]
    assert record["device"] == "cpu"
    assert record["peak_memory_mb"] > 10
    assert len(record["inputs"]["split"]["sha256"]) == 64


def test_the_table_has_every_method_seed_and_reference(finished_run: Run):
    scores = pd.read_parquet(finished_run.folder / "results/tables/scores.parquet")
    assert {"no_change", "mean_effect", "additive", "perturbedvae", "truth", "noise_free"} <= set(scores["method"])
    assert set(scores.loc[scores["method"] == "perturbedvae", "seed"]) == {0, 1}
    assert set(scores.loc[scores["method"] == "additive", "seed"]) == {0}
    undefined = scores[scores["value"].isna()]
    assert undefined["reason"].notna().all()
    no_direction = scores[(scores["method"] == "no_change") & (scores["metric"] == "pearson_delta_ctrl")]
    assert no_direction["value"].isna().all()


def test_a_second_run_does_nothing(finished_run: Run):
    assert "Nothing to be done" in finished_run.snakemake()


def test_one_changed_key_reruns_only_what_depends_on_it(finished_run: Run):
    figures = {f"draw_{figure}": 1 for figure in (*RUN_FIGURES, *SPLIT_FIGURES)} | {"report": 1, "resolve_config": 1}
    figures |= {"tabulate_study": 2, "draw_comparison": 1, "draw_sweep": 1}
    expected = {
        "statistics__n_bootstrap": (201, {"summarise": 1, **figures}),
        "evaluation__n_halves": (3, {"references": 1, "summarise": 1, **figures}),
        "method_params__perturbedvae": (
            {"n_nu": 4, "n_iota": 8, "n_hidden": 16, "epochs": 4},
            {"fit": 3, "predict": 3, "evaluate": 3, "summarise": 1, **figures},
        ),
        "splits__zero_shot": (
            {"kind": "unseen_combo", "seed": 1},
            {"split": 1, "features": 1, "check_leakage": 1, "fit": 6, "predict": 6, "evaluate": 6, "references": 1,
             "summarise": 1, **figures},
        ),
        "seeds": ([0, 1, 2], {"fit": 1, "predict": 1, "evaluate": 1, "summarise": 1, **figures}),
    }  # fmt: skip
    try:
        for key, (value, rules) in expected.items():
            finished_run.configure(**{key: value})
            assert finished_run.planned() == rules, key
    finally:
        finished_run.configure()
    assert finished_run.planned() == {}


def test_the_same_config_twice_gives_the_same_bytes(finished_run: Run, new_run: Run):
    new_run.snakemake("benchmark")
    first, second = finished_run.tables(), new_run.tables()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_an_item_of_the_paper_is_a_target(finished_run: Run):
    """An answered one is there already; one that is not answered says which config does, in one line."""
    assert "Nothing to be done" in finished_run.snakemake("paper_a_table13")
    shown = finished_run.snakemake("paper_a_table10", check=False)
    lines = [line for line in shown.splitlines() if line.startswith("perturbed: ")]
    assert len(lines) == 1
    assert "nothing in this config answers paper_a_table10; --configfile" in lines[0]
    assert "paper.yaml does" in lines[0]


def test_a_finished_run_knows_its_longest_jobs_and_what_each_method_can_run_on(finished_run: Run):
    longest = pd.read_csv(finished_run.folder / "results/longest_jobs.csv")
    assert len(longest) == 10
    assert longest["seconds"].is_monotonic_decreasing
    capabilities = pd.read_csv(finished_run.folder / "results/tables/capabilities.csv")
    assert set(capabilities["method"]) >= {"additive", "perturbedvae_unaligned"}


def test_mistakes_stop_before_anything_runs(new_run: Run):
    new_run.configure(seedz=[1])
    shown = new_run.snakemake(check=False)
    assert "unknown key 'seedz'; did you mean 'seeds'?" in shown
    assert "Traceback" not in shown
    assert not (new_run.folder / "data").exists()


def test_a_leak_fails_the_dag_with_the_offending_names(finished_run: Run, tmp_path):
    """A split file that trains on a tested combination is refused by name before anything is fitted."""
    run = Run(tmp_path / "leaky")
    shutil.copytree(finished_run.folder / "data", run.folder / "data")
    split = (finished_run.folder / "results/tiny/zero_shot/fold0/split.csv").read_text()
    rows = [line for line in split.splitlines() if not line.startswith("# ")]
    tested = next(line.split(",")[1] for line in rows if "+" in line and ",test," in line)
    leaky, moved = [], 0
    for line in rows:
        if f",{tested},test," in line and moved < 3:
            cell, name, *_ = line.split(",")
            line, moved = f"{cell},{name},train,", moved + 1
        leaky.append(line)
    table = pd.DataFrame([line.split(",") for line in leaky[1:]], columns=leaky[0].split(","))
    from perturbed.data.contracts import Split, write_split

    write_split(run.folder / "leaky.csv", Split(table.set_index("cell"), {"seed": 0}))
    run.configure(splits={"leaky": {"kind": "from_file", "path": "leaky.csv"}}, methods=["additive"], studies={})
    shown = run.snakemake("benchmark", check=False)
    assert tested in shown
    assert "check_leakage" in shown
    assert not list(run.folder.glob("results/**/model"))


def test_a_users_own_prediction_gets_the_same_table(finished_run: Run, tmp_path):
    """By name: genes in another order and further genes change nothing, a missing gene is named."""
    import anndata
    import numpy as np

    fold = finished_run.folder / "results/tiny/zero_shot/fold0"
    ours = anndata.read_h5ad(fold / "additive/seed0/prediction.h5ad")
    mine = anndata.AnnData(ours.X[::-1, ::-1].copy(), obs=ours.obs[["perturbation"]][::-1], var=ours.var[::-1])
    extra = anndata.AnnData(np.zeros((len(mine), 1)), obs=mine.obs, var=pd.DataFrame(index=["further"]))
    anndata.concat([mine, extra], axis="var", merge="first").write_h5ad(tmp_path / "mine.h5ad")
    call = [
        sys.executable,
        "-m",
        "perturbed.cli",
        "evaluate",
        "--truth",
        finished_run.folder / "data/tiny/prepared.h5ad",
    ]
    call += ["--split", fold / "split.csv", "--spec", "{max_cells: 20}"]
    done = subprocess.run([*call, "--prediction", "mine.h5ad"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = ["perturbation", "metric"]
    table = pd.read_parquet(tmp_path / "scores.parquet").set_index(keys).sort_index()
    assert set(table["method"]) == {"mine"}
    expected = pd.read_parquet(fold / "additive/seed0/scores.parquet").set_index(keys).sort_index()
    means = expected.index.get_level_values("metric").isin(
        ["l2_delta", "pearson_delta_ctrl", "pds_l1", "rmse_relative"]
    )
    np.testing.assert_allclose(table["value"][means], expected["value"][means], rtol=1e-5)

    mine[:, 1:].copy().write_h5ad(tmp_path / "short.h5ad")
    done = subprocess.run([*call, "--prediction", "short.h5ad"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "short.h5ad" in done.stderr and mine.var_names[0] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_report_opens_without_console_errors(finished_run: Run, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = (finished_run.folder / "results/report.html").resolve().as_uri()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000"]  # fmt: skip
    call = [chromium, *flags, f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom", page]
    shown = subprocess.run(call, capture_output=True, text=True, timeout=120)
    console = re.findall(r".*CONSOLE.*", shown.stderr)
    assert not [line for line in console if "error" in line.lower()], console
    assert "Benchmark" in shown.stdout


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("config/*.yaml"))])
def test_shipped_configs_have_a_dag(name, tmp_path):
    arguments = ("--configfile", f"config/{name}.yaml")
    call = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run", "--quiet", "all"]
    done = subprocess.run(
        [*call, "--cores", "1", *arguments], cwd=ROOT, env=Run(tmp_path).environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
