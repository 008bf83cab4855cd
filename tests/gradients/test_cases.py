"""Gradient cases from a fitted decoder to tables, on cells whose direction is planted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import pearsonr

from data_world import make_fold, make_prepared
from perturbed.config import FeatureSpec, RandomCells
from perturbed.data.contracts import open_prepared
from perturbed.errors import DataError
from perturbed.figures.gradients import draw_case_figure, draw_quality_figure
from perturbed.gradients.cases import run_case
from perturbed.gradients.cells import decoder_of, encode_cells
from perturbed.gradients.expression import correlate_genes, reconstruction_errors
from perturbed.gradients.gather import gather_flows
from perturbed.gradients.screen import run_screen
from perturbed.gradients.spec import GradientCase
from perturbed.models.base import load_model
from perturbed.models.fitting import fit_model
from perturbed.models.nb_vae import encoder_input

GENES = ("A", "B", *(f"g{i:02d}" for i in range(28)))
PROGRAM = slice(10, 18)
HEAD = {"stimulated": {"column": "perturbation", "positive": ["A"], "weight": 50.0}}
QUICK = {"n_latent": 3, "hidden": [24], "kl_weight": 1.0, "batch_size": 64, "lr": 0.01, "epochs": 20, "min_epochs": 5}
CASE = {
    "dataset": "", "split": "", "method": "",
    "moves": [{"targets": ["stimulated"]}],
    "unperturbed": {"column": "perturbation", "values": ["control"]},
    "perturbed": {"column": "perturbation", "values": ["A"]},
    "groups": "context", "genes": ["A", "g10"], "unit": True, "delta": 0.2, "n_steps": 10,
    "n_bootstrap": 100, "n_permutations": 99, "n_random_genes": 8,
}  # fmt: skip


def counts(seed=0) -> anndata.AnnData:
    """Cells of two types; A raises itself and a program, B raises itself alone, and the program varies in all cells."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame([(p, c) for p in ("control", "A", "B") for c in ("x", "y") for _ in range(60)])
    obs.columns = ["perturbation", "context"]
    log_rate = np.full((len(obs), len(GENES)), 1.5) + rng.normal(0, 0.3, len(GENES))
    log_rate[:, 20:25] += 1.5 * (obs["context"] == "y").to_numpy()[:, None]
    state = rng.normal(0, 0.3, len(obs)) + 1.2 * (obs["perturbation"] == "A").to_numpy()
    log_rate[:, PROGRAM] += state[:, None]
    log_rate[:, 0] += state
    log_rate[:, 1] += 1.0 * (obs["perturbation"] == "B").to_numpy()
    obs.index = pd.Index([f"c{i:04d}" for i in range(len(obs))])
    X = sparse.csr_matrix(rng.poisson(np.exp(log_rate)).astype(np.float32))
    return anndata.AnnData(X, obs=obs.assign(day=state), var=pd.DataFrame(index=pd.Index(GENES)))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("world")
    prepared = make_prepared(folder, counts(), keys={"context": "context", "keep": {"day": "day"}})
    split, features = make_fold(folder, prepared, RandomCells(kind="random_cells"), FeatureSpec(n_hvg="all", n_pcs=3))
    models = {}
    for name, mask in (("open", {}), ("masked", {"mask": {"context": ["y"]}})):
        heads = {"stimulated": {**HEAD["stimulated"], **mask}}
        method = {"title": name, "implementation": "perturbed.models.nb_vae:NBVAE", "params": {**QUICK, "heads": heads}}
        fit_model(method, prepared, split, features, folder / name, seed=1, device="cpu")
        models[name] = folder / name
    return SimpleNamespace(folder=folder, cells=(prepared, split, features), models=models)


def run(world, out: Path, model="open", seed=0, masked=None, **changes) -> dict[str, pd.DataFrame]:
    case = GradientCase.model_validate({**CASE, **changes})
    out.parent.mkdir(parents=True, exist_ok=True)
    run_case(case, world.models[model], *world.cells, out, seed=seed, judged_group=masked)
    return {path.stem: pd.read_csv(path) for path in out.glob("*.csv") if path.stat().st_size > 1}


def test_the_planted_direction_is_found_and_nulls_are_not(world, tmp_path):
    tables = run(world, tmp_path / "all" / "seed0")
    agreement = tables["agreement"].set_index(["group", "flow"])
    for group in ("all", "x", "y"):
        row = agreement.loc[(group, "gradient")]
        assert row["cosine"] > 0.8 and row["low"] > 0.5 and row["p"] <= 0.05
        assert abs(agreement.loc[(group, "untrained decoder"), "cosine"]) < row["cosine"]
    assert agreement.loc[("x", "difference of means, other groups"), "cosine"] > 0.5
    genes = tables["genes"][tables["genes"]["group"] == "all"].set_index("gene")
    program = genes.loc[list(GENES[PROGRAM])]
    others = genes.drop(index=[*program.index, "A"])
    assert program["cosine"].min() > others["cosine"].median()
    assert program["correlation"].min() > others["correlation"].median()
    assert genes.loc["A", "percentile_among_alike"] > 0.5
    assert (tables["arrivals"]["share_after"] > tables["arrivals"]["share_before"] + 0.5).all()
    paths = tables["paths"].pivot(index="step", columns="gene", values="mean")
    assert paths["g10"].iloc[-1] > 1.5 * paths["g10"].iloc[0]
    test = tables["heads"].set_index(["part", "metric"])["value"]
    assert test["test", "auc"] > 0.9
    assert set(tables["quality"]["metric"]) == {"mse_log1p_scaled", "mae_log1p_scaled", "ari_best_kmeans"}


def test_a_masked_group_is_judged_alone_and_equal_seeds_are_equal_bytes(world, tmp_path):
    tables = run(world, tmp_path / "y" / "seed0", "masked", masked="y")
    row = tables["agreement"].set_index("flow").loc["gradient"]
    assert row["group"] == "y" and row["cosine"] > 0.5 and row["low"] > 0
    assert set(tables["agreement"]["group"]) == {"y"}
    heads = tables["heads"].set_index(["part", "metric"])["value"]
    assert heads["masked group", "auc"] > 0.8
    run(world, tmp_path / "again", "masked", masked="y")
    for path in (tmp_path / "again").glob("*.csv"):
        assert path.read_bytes() == (tmp_path / "y" / "seed0" / path.name).read_bytes(), path.name


def test_a_time_is_compared_with_its_local_gradient(world, tmp_path):
    changes = {"perturbed": None, "time": "day", "groups": None, "moves": [{"targets": ["g10", "g11"]}]}
    tables = run(world, tmp_path / "all" / "seed0", **changes)
    row = tables["agreement"].iloc[0]
    assert row["flow"] == "gradient, against time" and row["low"] > 0.1 and row["null_high"] < row["cosine"]


def test_seeds_are_gathered_and_drawn(world, tmp_path):
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / "case" / "all" / f"seed{seed}")
        run(world, folders[-1], seed=seed)
    gathered = tmp_path / "case" / "tables"
    gather_flows(folders, gathered)
    each = [pd.read_csv(folder / "agreement.csv") for folder in folders]
    both = pd.read_csv(gathered / "agreement_seeds.csv")
    first = both[(both["group"] == "x") & (both["flow"] == "gradient")].iloc[0]
    rows = [table[(table["group"] == "x") & (table["flow"] == "gradient")].iloc[0] for table in each]
    assert first["cosine"] == pytest.approx(np.mean([row["cosine"] for row in rows]), rel=1e-4)
    assert first["low"] == pytest.approx(min(row["low"] for row in rows), rel=1e-4) and first["n_seeds"] == 2
    draw_case_figure("flow", gathered, tmp_path / "flow", "A case")
    draw_quality_figure([gathered], tmp_path / "quality", {"case": "A case"})
    for stem in ("flow", "quality"):
        assert all((tmp_path / f"{stem}.{suffix}").stat().st_size > 500 for suffix in ("svg", "png", "csv"))
    with pytest.raises(DataError, match="not called GROUP/seedN"):
        gather_flows([gathered], tmp_path / "x")


def test_a_screen_finds_planted_effects_and_not_their_permutations(world, tmp_path):
    prepared = open_prepared(world.cells[0])
    effect = np.zeros((3, len(GENES)))
    effect[1, PROGRAM], effect[1, 0], effect[2, 1] = 1.0, 1.0, 1.0
    truth = anndata.AnnData(effect, obs=pd.DataFrame(index=["control", "A", "B"]), var=prepared.var)
    truth.write_h5ad(tmp_path / "truth.h5ad")
    case = {**CASE, "moves": [], "screen": True, "perturbed": None, "groups": None}
    out = tmp_path / "all" / "seed0"
    out.parent.mkdir()
    spec = GradientCase.model_validate(case)
    run_screen(spec, world.models["open"], *world.cells, out, truth=tmp_path / "truth.h5ad")
    table = pd.read_csv(out / "screen.csv").set_index(["perturbation", "flow", "shift"])
    planted = table.loc[("A", "planted effect", "without own genes")]
    assert planted["cosine"] > 0.7 and planted["percentile_among_alike"] > 0.8 and abs(planted["cosine_alike"]) < 0.5
    assert table.loc[("A", "gradient", "all genes"), "cosine"] > 0.5, "A varies with the program it drives"
    blind = table.loc[("B", "gradient", "without own genes"), "effect_size"]
    assert blind < table.loc[("B", "gradient", "all genes"), "effect_size"], "B shows in its own expression only"
    gather_flows([out], tmp_path / "tables")
    draw_case_figure("screen", tmp_path / "tables", tmp_path / "screen")
    assert (tmp_path / "screen.svg").stat().st_size > 500


def test_expression_is_read_as_obvious_references_do(world):
    method = load_model(world.models["open"])
    cells = encode_cells(decoder_of(method), *world.cells)
    X = open_prepared(world.cells[0]).X[:].toarray()
    rows = np.arange(0, len(X), 3)
    value = np.sin(rows.astype(float))
    found = correlate_genes(world.cells[0], method.genes, {"these": (rows, value)})["these"]
    np.testing.assert_allclose(found, [pearsonr(X[rows, g], value)[0] for g in range(len(GENES))], atol=1e-6)
    errors = {
        (row["part"], row["metric"]): row["value"] for row in reconstruction_errors(method, world.cells[0], cells)
    }
    test = (cells.obs["part"] == "test").to_numpy()
    seen = encoder_input(sparse.csr_matrix(X[test]), "nb").toarray()
    decoded = decoder_of(method).decode(cells.encoded.mean[test], {}).expression.detach().numpy()
    assert errors["test", "mse_log1p_scaled"] == pytest.approx(((seen - np.log1p(decoded)) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": ["A", "gone"]}, "'gone' is no output of the decoder"),
        ({"moves": [{"targets": ["stimulate"]}]}, "did you mean 'stimulated'"),
        ({"groups": "contexts"}, "no column 'contexts'"),
        ({"judged": ["z"]}, "no cell has context 'z'"),
        ({"min_cells": 500, "judged": ["x"]}, "group 'x' has fewer than 500 cells in an arm"),
        ({"perturbed": {"values": ["C"]}}, "no cell has perturbation 'C'"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, changes, message):
    with pytest.raises(DataError) as caught:
        run(world, tmp_path / "out", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"moves": []},
        {"screen": True},
        {"perturbed": None},
        {"masked_groups": True},
        {"groups": None, "judged": ["x"]},
    ],
)
def test_a_case_that_asks_nothing_or_two_things_is_refused(changes):
    with pytest.raises(ValueError, match="Value error"):
        GradientCase.model_validate({**CASE, **changes})


def test_a_case_survives_json():
    case = GradientCase.model_validate(CASE)
    assert GradientCase.model_validate(json.loads(case.model_dump_json())) == case
