"""Agreement with published packages and with the floors measured on real cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from evaluation_world import META, World, make_world, prediction_of, write_world

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Split, write_split
from perturbed.evaluation.distances import energy_distance, mmd_multiscale, mmd_rbf
from perturbed.evaluation.evaluate import evaluate
from perturbed.evaluation.references import score_references
from perturbed.names import CONTROL, join_genes

NORMAN = Path(__file__).parents[2] / "../shared/data/norman2019_combo1000.h5ad"
needs_norman = pytest.mark.skipif(not NORMAN.is_file(), reason=f"{NORMAN.name} is not in ../shared/data")


@pytest.fixture(scope="module")
def norman(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The real cells untouched: singles and control train, doubles test."""
    adata = anndata.read_h5ad(NORMAN)
    names = [CONTROL if c == "control" else join_genes(c.split("+")) for c in adata.obs["condition"].astype(str)]
    table = pd.DataFrame({"perturbation": names, "context": "all"}, index=adata.obs_names.astype(str))
    double = table.perturbation.str.contains("+", regex=False)
    table["part"] = np.where(double, "test", "train")
    table["subgroup"] = np.where(double, "combo_seen2", "")
    return write_world(tmp_path_factory.mktemp("norman"), adata.X.toarray(), table, list(adata.var_names.astype(str)))


def hold_out(world: World, path: Path, control: np.ndarray) -> World:
    """The same cells with some of the control cells in the test part."""
    table = world.table.copy()
    rows = np.flatnonzero(table.perturbation == CONTROL)[control]
    table.iloc[rows, table.columns.get_loc("part")] = "test"
    write_split(path, Split(table[["perturbation", "part", "subgroup"]], META))
    return replace(world, split=path, table=table)


def floors(world: World) -> dict[str, dict[str, np.ndarray]]:
    c, m = world.control(), world.trained_mean()
    additive = world.additive()
    return {
        "no_change": dict.fromkeys(world.tested(), c),
        "mean_effect": dict.fromkeys(world.tested(), m),
        "additive": dict(zip(additive.perturbation, additive.mean)),
    }


@needs_norman
def test_floors_of_the_real_cells(norman: World) -> None:
    world = norman
    spec = EvaluationSpec(
        metrics=("pearson_delta_ctrl", "pearson_delta_pert", "l2_delta", "pearson_delta_ctrl_disjoint")
    )
    means = {}
    for name, rows in floors(world).items():
        as_stored = {p: row.astype(np.float32) for p, row in rows.items()}
        table = evaluate(world.prepared, world.split, prediction_of(as_stored, world.genes), spec)
        means[name] = table.groupby("metric")["value"].mean()
        reasons = table.set_index("metric")["reason"]
        assert set(reasons["pearson_delta_ctrl_disjoint"]) == {"no held-out control cells (control_test_fraction 0)"}
        if name == "no_change":
            assert set(reasons["pearson_delta_ctrl"]) == {"the predicted effect is constant over genes"}
        if name == "mean_effect":
            assert set(reasons["pearson_delta_pert"]) == {"the predicted effect is constant over genes"}
    assert means["additive"]["pearson_delta_ctrl"] == pytest.approx(0.788, abs=5e-4)
    assert means["additive"]["l2_delta"] == pytest.approx(4.29, abs=5e-3)
    assert means["additive"]["pearson_delta_pert"] == pytest.approx(0.633, abs=5e-4)
    assert means["mean_effect"]["pearson_delta_ctrl"] == pytest.approx(0.606, abs=5e-4)
    assert means["mean_effect"]["l2_delta"] == pytest.approx(4.82, abs=5e-3)
    assert np.isnan(means["mean_effect"]["pearson_delta_pert"])
    assert means["no_change"]["l2_delta"] == pytest.approx(5.92, abs=5e-3)
    assert np.isnan(means["no_change"]["pearson_delta_ctrl"])


@needs_norman
def test_disjoint_controls_of_the_real_cells(norman: World, tmp_path: Path) -> None:
    spec = EvaluationSpec(metrics=("pearson_delta_ctrl_disjoint",))
    rng = np.random.default_rng(3)
    values = []
    for draw in range(8):
        world = hold_out(norman, tmp_path / f"{draw}.csv", rng.permutation(40)[:20])
        additive = evaluate(world.prepared, world.split, world.additive(), spec)
        values.append(additive["value"].mean())
    assert np.mean(values) == pytest.approx(0.53, abs=0.02)


@needs_norman
def test_duplicates_of_the_real_cells(norman: World) -> None:
    world = norman
    spec = EvaluationSpec(metrics=("pearson_delta_ctrl", "l2_delta"), n_halves=4)
    table = score_references(world.prepared, world.split, None, spec)
    mean = table.groupby(["method", "metric"])["value"].mean()
    r = 0.776  # two halves of 20 profiles, measured before; l2 3.96
    assert mean["technical_duplicate", "pearson_delta_ctrl"] == pytest.approx(2 * r / (1 + r), abs=0.01)
    assert mean["technical_duplicate", "l2_delta"] == pytest.approx(3.96 * np.sqrt(0.5), abs=0.03)
    assert mean["truth", "pearson_delta_ctrl"] == pytest.approx(1)
    assert mean["truth", "l2_delta"] == pytest.approx(0, abs=1e-9)


def test_cell_eval_agrees(tmp_path: Path) -> None:
    pytest.importorskip("cell_eval")
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval.metrics._anndata import discrimination_score, mae, mse, pearson_delta

    world = make_world(tmp_path)
    names = world.tested()
    additive = world.additive()
    noisy = additive.mean + np.random.default_rng(5).normal(0, 0.5, additive.mean.shape)
    controls = world.cells(CONTROL, ("train", "val"))
    real = np.vstack([controls, *(world.cells(p, "test") for p in names)])
    pred = np.vstack([controls, *(np.tile(row, (len(world.cells(p, "test")), 1)) for p, row in zip(names, noisy))])
    labels = [CONTROL] * len(controls) + [p for p in names for _ in range(len(world.cells(p, "test")))]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    var = pd.DataFrame(index=world.genes)
    pair = PerturbationAnndataPair(
        real=anndata.AnnData(real.astype(np.float64), obs=obs, var=var),
        pred=anndata.AnnData(pred.astype(np.float64), obs=obs.copy(), var=var.copy()),
        pert_col="perturbation",
        control_pert=CONTROL,
    )
    wanted = ("pearson_delta_ctrl", "mae", "rmse", "pds_l1", "pds_cosine")
    prediction = prediction_of(dict(zip(names, noisy)), world.genes)
    table = evaluate(world.prepared, world.split, prediction, EvaluationSpec(metrics=wanted))
    ours = table.pivot(index="perturbation", columns="metric", values="value")

    def theirs(values: dict[str, float]) -> np.ndarray:
        return np.array([values[p] for p in ours.index])

    np.testing.assert_allclose(ours["pearson_delta_ctrl"], theirs(pearson_delta(pair)), rtol=1e-5)
    np.testing.assert_allclose(ours["mae"], theirs(mae(pair)), rtol=1e-5)
    np.testing.assert_allclose(ours["rmse"] ** 2, theirs(mse(pair)), rtol=1e-5)
    n = len(names)
    for name, metric in (("pds_l1", "l1"), ("pds_cosine", "cosine")):
        # theirs excludes a gene only by the name of the whole perturbation, so on doubles none
        there = theirs(discrimination_score(pair, metric=metric, exclude_target_gene=False))
        expected = 1 - (1 - there) * n / (n - 1)
        effects = np.stack([world.cells(p, "test").mean(0, dtype=float) for p in ours.index]) - world.control()
        plain = [_rank(effects, noisy[names.index(p)] - world.control(), i, metric) for i, p in enumerate(ours.index)]
        np.testing.assert_allclose(plain, expected, atol=1e-12)  # the same score without exclusion
        for i, p in enumerate(ours.index):
            keep = ~np.isin(world.genes, p.split("+"))
            own = _rank(effects[:, keep], (noisy[names.index(p)] - world.control())[keep], i, metric)
            assert ours[name].iloc[i] == pytest.approx(own, abs=1e-12)


def _rank(effects: np.ndarray, predicted: np.ndarray, own: int, metric: str) -> float:
    if metric == "l1":
        d = [np.abs(e - predicted).sum() for e in effects]
    else:
        d = [1 - e @ predicted / np.linalg.norm(e) / np.linalg.norm(predicted) for e in effects]
    return 1 - sum(x < d[own] for x in d) / (len(d) - 1)


def test_pertpy_agrees() -> None:
    pertpy = pytest.importorskip("pertpy")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 6)), rng.normal(0.4, 1.2, size=(25, 6))
    energy = pertpy.tools.Distance("edistance", obsm_key="X_pca")
    there = float(energy(x, y))

    def within(z: np.ndarray) -> float:
        return float(np.mean([np.linalg.norm(a - b) for a in z for b in z]))

    # theirs counts the zero distance of a cell to itself
    extra = within(x) / (len(x) - 1) + within(y) / (len(y) - 1)
    assert energy_distance(x, y) == pytest.approx(there - extra, rel=1e-6)

    mmd = pertpy.tools.Distance("mmd", obsm_key="X_pca")
    widths = 1000.0 * 2.0 ** (np.arange(10) - 5)
    summed = sum(float(mmd(x, y, kernel="rbf", gamma=1 / w)) for w in widths)
    assert mmd_multiscale(x, y) == pytest.approx(summed, rel=1e-6, abs=1e-9)

    v_statistic = float(mmd(x, y, kernel="rbf", gamma=1 / (2 * 1.5**2)))
    kernel = [np.mean([[np.exp(-np.sum((a - b) ** 2) / 4.5) for a in z] for b in z]) for z in (x, y)]
    unbias = [(k * len(z) - 1) / (len(z) - 1) - k for k, z in zip(kernel, (x, y))]
    assert mmd_rbf(x, y, 1.5) == pytest.approx(v_statistic + sum(unbias), rel=1e-6)
