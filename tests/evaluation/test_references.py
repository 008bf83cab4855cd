"""Ceilings: disjoint halves, the corrections to the full n, the interpolated duplicate and the noise-free truth."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from evaluation_world import World, make_world, write_world
from scipy import stats
from statsmodels.stats.multitest import multipletests

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import SCORE_COLUMNS, write_h5ad
from perturbed.evaluation.loading import load_truth
from perturbed.evaluation.references import (
    REFERENCES,
    carry_to_full_n,
    interpolate,
    score_references,
    split_halves,
)
from perturbed.evaluation.registry import METRICS
from perturbed.names import CONTROL, genes_of

SPEC = EvaluationSpec(n_halves=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), n_cells=25)


def write_truth(path: Path, world: World, rows: dict[str, np.ndarray], context: str = "all") -> Path:
    obs = pd.DataFrame({"perturbation": list(rows), "context": context}, index=list(rows))
    adata = anndata.AnnData(
        np.stack(list(rows.values())).astype(np.float32), obs=obs, var=pd.DataFrame(index=world.genes)
    )
    adata.layers["variance"] = np.ones_like(adata.X)
    write_h5ad(path, adata)
    return path


def test_all_references(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {p: rng.random(60) for p in (CONTROL, *(f"g{i}" for i in range(8)), *world.tested())}
    table = score_references(
        world.prepared, world.split, None, SPEC, write_truth(tmp_path / "truth.h5ad", world, rows), meta={"fold": 2}
    )
    assert tuple(table.columns) == SCORE_COLUMNS
    assert set(table["method"]) == set(REFERENCES) and set(table["fold"]) == {2}
    assert not table.duplicated(["method", "perturbation", "metric"]).any()
    assert (table["value"].isna() <= (table["reason"] != "")).all()
    assert set(table[table.perturbation != "*"]["n_cells"]) == {25}  # of the whole condition, not of a half
    rmse = table[table.metric == "rmse"].set_index(["method", "perturbation"])["value"]
    for p in world.tested():
        x = world.cells(p, "test").mean(axis=0, dtype=float)
        additive = rows[CONTROL] + sum(rows[g] - rows[CONTROL] for g in genes_of(p))
        assert rmse["noise_free", p] == pytest.approx(np.sqrt(np.mean((rows[p] - x) ** 2)), rel=1e-5)
        assert rmse["noise_free_additive", p] == pytest.approx(np.sqrt(np.mean((additive - x) ** 2)), rel=1e-5)


def test_additive_needs_its_singles(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {p: rng.random(60) for p in (CONTROL, *(f"g{i}" for i in range(1, 8)), *world.tested())}
    path = write_truth(tmp_path / "truth.h5ad", world, rows)
    table = score_references(world.prepared, world.split, None, EvaluationSpec(metrics=("rmse",), n_halves=1), path)
    additive = table[table.method == "noise_free_additive"].set_index("perturbation")
    for p in world.tested():
        assert np.isnan(additive.loc[p, "value"]) == ("g0" in genes_of(p))
    assert additive.loc["g0+g1", "reason"] == "no noise-free g0 in all"


def test_truth_is_perfect(world: World) -> None:
    table = score_references(world.prepared, world.split, None, SPEC)
    assert set(table["method"]) == set(REFERENCES[:3])
    truth = table[table.method == "truth"].groupby("metric")["value"].mean()
    for name in (
        "rmse",
        "wmse",
        "pds_l1",
        "pearson_delta_pert",
        "e_distance",
        "mmd_rbf",
        "mmd_published",
        "spread_ratio",
    ):
        assert truth[name] == pytest.approx(METRICS[name].perfect, abs=1e-6)
    assert truth["rmse_relative"] > 0.1  # the condition's mean is not its cells


def test_halves_are_disjoint_and_change(world: World) -> None:
    truth = load_truth(world.prepared, world.split, SPEC)
    seen = []
    for draw in (0, 1):
        a, b = split_halves(truth, draw)
        for i in range(len(truth)):
            assert len(a.rows[i]) == len(b.rows[i]) == 12
            assert not set(a.rows[i]) & set(b.rows[i]) and set(a.rows[i]) | set(b.rows[i]) <= set(truth.rows[i])
            np.testing.assert_allclose(a.mean[i], truth.pool.cells[a.rows[i]].toarray().mean(axis=0), rtol=1e-5)
        seen.append(tuple(a.rows[0]))
    assert seen[0] != seen[1]
    again, _ = split_halves(truth, 1)
    assert tuple(again.rows[0]) == seen[1]


def test_technical_duplicate_by_hand(world: World) -> None:
    truth = load_truth(world.prepared, world.split, SPEC)
    table = score_references(world.prepared, world.split, None, SPEC)
    got = table[table.method == "technical_duplicate"].set_index(["metric", "perturbation"])["value"]
    c = world.control()
    c_test = world.cells(CONTROL, "test").mean(axis=0, dtype=float)
    halves = [split_halves(truth, draw) for draw in range(3)]
    for i in range(len(truth)):
        p = truth.key(i)[0]
        pairs = [(a.mean[i], b.mean[i]) for a, b in halves]
        r = np.mean([np.corrcoef(a - c, b - c)[0, 1] for a, b in pairs])
        assert got["pearson_delta_ctrl", p] == pytest.approx(2 * r / (1 + r), rel=1e-6)
        l2 = np.mean([np.linalg.norm(a - b) for a, b in pairs])
        assert got["l2_delta", p] == pytest.approx(l2 / np.sqrt(2), rel=1e-6)
        carried = []
        for a, b in pairs:
            noise = np.var(a - b) / 2
            covariance = np.cov(a - c_test, b - c, bias=True)[0, 1]
            carried.append(covariance / np.sqrt((np.var(a - c_test) - noise / 2) * (np.var(b - c) - noise / 2)))
        assert got["pearson_delta_ctrl_disjoint", p] == pytest.approx(np.mean(carried), rel=1e-6)


def test_corrections_recover_the_full_size(tmp_path: Path) -> None:
    """Two real samples of the full size score what the corrected halves of one predict."""
    rng = np.random.default_rng(11)
    genes = [f"g{i}" for i in range(400)]
    base, names = rng.random(400) + 3, [f"g{i}" for i in range(6)]
    effect = {p: rng.normal(0, 0.25, 400) for p in names}
    blocks = [(CONTROL, "train", rng.normal(base, 1, (60, 400))), (CONTROL, "test", rng.normal(base, 1, (60, 400)))]
    blocks += [("g9", "train", rng.normal(base, 1, (40, 400)))]
    blocks += [(p, "test", rng.normal(base + effect[p], 1, (40, 400))) for p in names]
    table = pd.DataFrame([(p, "all", part, "") for p, part, cells in blocks for _ in cells])
    table.columns = pd.Index(["perturbation", "context", "part", "subgroup"])
    table.index = pd.Index([f"c{i:05d}" for i in range(len(table))])
    world = write_world(tmp_path, np.vstack([cells for *_, cells in blocks]), table, genes)
    corrected = {
        name: METRICS[name]
        for name in ("pearson_delta_ctrl", "pearson_delta_ctrl_disjoint", "cosine", "rmse", "mae", "l2_delta", "r2")
    }
    spec = EvaluationSpec(metrics=tuple(corrected), n_halves=8)
    got = score_references(world.prepared, world.split, None, spec)
    got = got[got.method == "technical_duplicate"].groupby("metric")["value"].mean()
    c, c_test = world.control(), world.cells(CONTROL, "test").mean(axis=0, dtype=float)
    second = {p: rng.normal(base + effect[p], 1, (40, 400)).mean(axis=0) for p in names}
    first = {p: world.cells(p, "test").mean(axis=0, dtype=float) for p in names}
    pairs = [(first[p], second[p]) for p in names]
    expected = {
        "pearson_delta_ctrl": np.mean([np.corrcoef(a - c, b - c)[0, 1] for a, b in pairs]),
        "pearson_delta_ctrl_disjoint": np.mean([np.corrcoef(a - c_test, b - c)[0, 1] for a, b in pairs]),
        "cosine": np.mean([(a - c) @ (b - c) / np.linalg.norm(a - c) / np.linalg.norm(b - c) for a, b in pairs]),
        "rmse": np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in pairs]),
        "mae": np.mean([np.mean(np.abs(a - b)) for a, b in pairs]),
        "l2_delta": np.mean([np.linalg.norm(a - b) for a, b in pairs]),
        "r2": np.mean([1 - np.sum((a - b) ** 2) / np.sum((a - a.mean()) ** 2) for a, b in pairs]),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=0.03 * max(1, value)), name
    plain = np.mean([np.corrcoef(a.mean[i] - c, b.mean[i] - c)[0, 1] for a, b in [split_halves(
        load_truth(world.prepared, world.split, spec), 0)] for i in range(6)])  # fmt: skip
    assert plain < expected["pearson_delta_ctrl"] - 0.05  # uncorrected halves would say too little


def test_carry_to_full_n() -> None:
    v = np.array([0.5, -0.2])
    np.testing.assert_allclose(carry_to_full_n(v, "spearman_brown"), [2 / 3, -1 / 3])
    np.testing.assert_allclose(carry_to_full_n(v, "half"), v / 2)
    np.testing.assert_allclose(carry_to_full_n(v, "root_half"), v * 0.5**0.5)
    # noise N, signal S: halves 1 − 2N / (S + N), full 1 − N / (S + N / 2)
    for noise, signal in ((1.0, 5.0), (1.0, 0.5), (1.0, 0.0)):
        halves, full = 1 - 2 * noise / (signal + noise), 1 - noise / (signal + noise / 2)
        assert carry_to_full_n(np.array([halves]), "half_residual")[0] == pytest.approx(full)
    assert carry_to_full_n(np.array([-7.0]), "half_residual")[0] == -7
    np.testing.assert_array_equal(carry_to_full_n(v, "plain"), v)


def test_interpolated_duplicate(world: World) -> None:
    truth = load_truth(world.prepared, world.split, SPEC)
    _, other = split_halves(truth, 0)
    t = world.table
    background = world.X[(t.part.isin(["train", "val"]) & (t.perturbation != CONTROL)).to_numpy()]
    for i in range(len(truth)):
        half = truth.pool.cells[other.rows[i]].toarray().astype(float)
        p = stats.ttest_ind(half, background.astype(float), equal_var=False).pvalue
        q = multipletests(p, method="fdr_bh")[1]
        made = interpolate(other, i)
        assert not isinstance(made, str)
        np.testing.assert_allclose(made.mean, (1 - q) * half.mean(axis=0) + q * world.trained_mean(), rtol=1e-4)
        np.testing.assert_allclose(np.asarray(made.cells).mean(axis=0), made.mean, rtol=1e-5)


def test_noise_free_beats_duplicates_in_simulation(tmp_path: Path) -> None:
    """A population mean predicts better than a second sample; the interpolated duplicate beats mean noise."""
    world = make_world(tmp_path, n_cells=12, n_genes=200)
    rng = np.random.default_rng([0, 77])  # the stream of the world: base and effects come first
    base = rng.gamma(1.0, 1.0, 200)
    shift = {f"g{i}": rng.normal(0, 1, 200) * (rng.random(200) < 0.4) for i in range(8)}

    def mean(p: str) -> np.ndarray:
        m = base + sum((shift[g] for g in genes_of(p)), np.zeros(200))
        z = m / 0.7
        return m * stats.norm.cdf(z) + 0.7 * stats.norm.pdf(z)  # mean of max(N(m, 0.7), 0)

    rows = {p: mean(p) for p in (CONTROL, *shift, *world.tested())}
    spec = EvaluationSpec(metrics=("l2_delta", "pearson_delta_ctrl"), n_halves=4)
    path = write_truth(tmp_path / "truth.h5ad", world, rows)
    table = score_references(world.prepared, world.split, None, spec, path)
    score = table.groupby(["metric", "method"])["value"].mean()
    assert score["l2_delta", "noise_free"] < score["l2_delta", "technical_duplicate"]
    ratio = score["l2_delta", "technical_duplicate"] / score["l2_delta", "noise_free"]
    assert ratio == pytest.approx(np.sqrt(2), abs=0.1)
    assert score["pearson_delta_ctrl", "noise_free"] > score["pearson_delta_ctrl", "technical_duplicate"]


def test_conditions_too_small_for_halves(world: World, tmp_path: Path) -> None:
    table = world.table.copy()
    rare = np.flatnonzero(table.perturbation == "g6+g7")
    table.iloc[rare[3:], table.columns.get_loc("part")] = "unused"
    small = write_world(tmp_path, world.X, table, world.genes)
    scores = score_references(small.prepared, small.split, None, SPEC)
    rows = scores[(scores.perturbation == "g6+g7") & scores.method.str.contains("duplicate")]
    assert rows["value"].isna().all() and set(rows["reason"]) == {"1 test cells, fewer than min_cells 2"}
    assert set(rows["n_cells"]) == {3}
    others = scores[(scores.perturbation == "g0+g1") & (scores.metric == "rmse")]
    assert others["value"].notna().all()
