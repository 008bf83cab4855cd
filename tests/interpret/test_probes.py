"""Probes find what is there, find nothing in noise, and are refused cells that an encoder may have seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbed.data.contracts import Features, Split, read_split, write_features, write_h5ad, write_split
from perturbed.errors import DataError, LeakageError, MethodError
from perturbed.figures.probes import draw
from perturbed.figures.style import save
from perturbed.interpret.probes import COLUMNS, Representation, classify, probe, probe_split, score
from perturbed.interpret.spec import ProbeSpec
from perturbed.models.base import FitRun, build, load_method_spec, save_model
from perturbed.models.inputs import load_training_data
from perturbed.names import CONTROL

QUICK = ProbeSpec(penalties=(0.01,), n_permutations=200, n_bootstrap=200, n_folds=3)
CONDITIONS = [f"G{i:02d}" for i in range(8)]
METHODS = [Path(__file__).parents[2] / "config" / "methods"]


def blobs(distance: float, n_cells: int = 20, n_dimensions: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of eight conditions around centres `distance` apart from the origin."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(CONDITIONS, n_cells)
    centres = rng.normal(size=(len(CONDITIONS), n_dimensions))
    centres *= distance / np.linalg.norm(centres, axis=1, keepdims=True)
    return np.repeat(centres, n_cells, axis=0) + rng.normal(size=(len(labels), n_dimensions)), labels


def rows_of(values: np.ndarray, labels: np.ndarray, spec: ProbeSpec = QUICK) -> pd.DataFrame:
    return pd.DataFrame(probe(Representation("m", "m", values), labels, spec)).set_index(["n_dimensions", "metric"])


def test_separated_conditions_are_read_and_noise_is_not():
    values, labels = blobs(8.0)
    table = rows_of(values, labels)
    assert (table["value"] > 0.95).all()
    noise = rows_of(np.random.default_rng(5).normal(size=values.shape), labels)
    assert (noise["value"] <= noise["chance_high"]).all()
    for row in (*table.to_dict("records"), *noise.to_dict("records")):
        assert row["chance"] == pytest.approx(1 / 8, abs=0.01)
        assert row["low"] <= row["value"] <= row["high"]


def test_chance_is_a_null_with_the_right_level():
    _, labels = blobs(0.0)
    rng = np.random.default_rng(3)
    above = 0
    for _ in range(60):
        top = score(labels, rng.permutation(labels), QUICK)[0]
        above += top["value"] > top["chance_high"]
    assert above <= 9  # 3 expected


def test_scores_are_those_of_the_obvious_loop():
    rng = np.random.default_rng(1)
    labels = rng.choice(CONDITIONS[:4], size=70, p=[0.5, 0.3, 0.1, 0.1])
    predicted = np.where(rng.random(70) < 0.6, labels, rng.choice(CONDITIONS[:4], 70))
    balanced, plain = score(labels, predicted, QUICK)
    recall = [np.mean(predicted[labels == name] == name) for name in sorted(set(labels))]
    assert balanced["value"] == pytest.approx(np.mean(recall))
    assert plain["value"] == pytest.approx(np.mean(predicted == labels))


def test_no_cell_is_classified_by_a_probe_that_saw_it():
    """With a column that names each cell, memory would be perfect and generalisation is chance."""
    _, labels = blobs(0.0, n_cells=6)
    predicted = classify(np.eye(len(labels)), labels, ProbeSpec(penalties=(10.0,), n_folds=3))
    assert np.mean(predicted == labels) < 0.3


def test_scale_is_taken_from_the_training_folds():
    """Standardising makes units irrelevant."""
    values, labels = blobs(5.0)
    units = np.random.default_rng(0).uniform(0.01, 100, values.shape[1])
    np.testing.assert_array_equal(classify(values, labels, QUICK), classify(values * units + 7, labels, QUICK))


def test_wide_representations_give_what_the_plain_regression_gives():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    values, labels = blobs(5.0, n_cells=6, n_dimensions=200)
    found = classify(values, labels, QUICK)
    for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(values, labels):
        scaler = StandardScaler().fit(values[train])
        slow = LogisticRegression(C=0.01, max_iter=2000).fit(scaler.transform(values[train]), labels[train])
        assert np.mean(slow.predict(scaler.transform(values[test])) == found[test]) > 0.95


def test_equal_width_is_a_row_of_its_own_and_the_penalty_is_chosen_inside():
    values, labels = blobs(6.0)
    spec = QUICK.model_copy(update={"dimensions": (5, 99), "penalties": (1e-7, 0.1)})
    table = rows_of(values, labels, spec)
    assert set(table.index.get_level_values(0)) == {30, 5}  # 99 is wider than what there is
    assert table.loc[5, "reduced"].all() and not table.loc[30, "reduced"].any()
    assert table.loc[(5, "accuracy"), "value"] <= table.loc[(30, "accuracy"), "value"]
    assert table.loc[(30, "accuracy"), "value"] > 0.9  # with C = 1e-7 alone it would be less


# --- on files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared cells, a split whose test part holds every condition, features and a small PerturbedVAE."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(40)]
    labels = np.concatenate([[CONTROL] * 60, np.repeat(CONDITIONS, 36)])
    effect = {name: rng.normal(0, 1.2, len(genes)) for name in CONDITIONS}
    mean = np.stack([effect.get(name, np.zeros(len(genes))) for name in labels])
    counts = rng.poisson(20 * np.exp(0.5 * mean)).astype(np.float32)
    X = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    cells = [f"c{i}" for i in range(len(labels))]
    obs = pd.DataFrame(
        {"perturbation": labels, "n_perturbed": (labels != CONTROL).astype(int), "context": "all"}, cells
    )
    var = pd.DataFrame({"gene_id": genes, "symbol": genes}, genes)
    layers, uns = {"counts": sparse.csr_matrix(counts)}, {"perturbed": {"values": "counts"}}
    write_h5ad(folder / "prepared.h5ad", AnnData(sparse.csr_matrix(X), obs=obs, var=var, uns=uns, layers=layers))
    vectors = pd.DataFrame(mean @ rng.normal(size=(len(genes), 5)) + rng.normal(size=(len(cells), 5)), cells)
    vectors.sample(frac=1, random_state=0).to_csv(folder / "vectors.csv")  # found by name, not by place
    held = (np.arange(len(labels)) % 3 == 0) & (labels != CONTROL)
    subgroup = np.where(held, "single_seen_heldout_cells", "")
    table = pd.DataFrame({"perturbation": labels, "part": np.where(held, "test", "train"), "subgroup": subgroup}, cells)
    header = {"dataset": "toy", "split": "heldout", "fold": 0, "seed": 0, "spec": {}}
    write_split(folder / "split.csv", Split(table, header))
    sha = read_split(folder / "split.csv").header["sha256"]
    train = X[~held].astype(np.float64)
    loadings = np.linalg.svd(train - train.mean(0), full_matrices=False)[2][:6].T
    features = pd.DataFrame({"mean": train.mean(0), "sd": train.std(0)}, pd.Index(genes, name="gene"))
    features = features.assign(**{f"pc{i + 1}": loadings[:, i] for i in range(6)})
    write_features(folder / "features.csv", Features(features, {"split_sha256": sha, "upstream": False, "spec": {}}))
    files = {"cell_embedding": folder / "vectors.csv"}
    data = load_training_data(folder / "prepared.h5ad", folder / "split.csv", folder / "features.csv", files)
    for name, extra in (
        ("perturbedvae", {"n_nu": 4, "n_iota": 3, "n_hidden": 12, "epochs": 3}),
        ("scvi_additive", {"n_latent": 6, "n_hidden": 16, "epochs": 30, "n_samples": 0, "n_control": 5}),
        ("embedding_cells", {}),
        ("additive", {}),
    ):
        spec = load_method_spec(name, METHODS)
        method = build(spec, extra)
        method.fit(data, FitRun(seed=4, progress=False))
        save_model(folder / name, method, spec, {"sha256": sha, "seed": 4})
        save_model(folder / f"{name}_elsewhere", method, spec, {"sha256": "another", "seed": 4})
    return folder


def run(world, out, models, spec=QUICK, **other):
    files = {
        key: world / f"{key}.{'h5ad' if key == 'prepared' else 'csv'}" for key in ("prepared", "split", "features")
    }
    probe_split(**{**files, **other}, models=models, spec=spec, out=out)
    return pd.read_csv(out)


def test_a_split_is_probed_from_files_and_drawn(world, tmp_path):
    models = {"perturbedvae@4": world / "perturbedvae"}
    table = run(world, tmp_path / "probe.csv", models, QUICK.model_copy(update={"dimensions": (3,)}))
    assert tuple(table.columns) == COLUMNS
    assert set(table["representation"]) == {"PCA", "genes", "perturbedvae", "perturbedvae, z_iota"}
    assert set(table["n_cells"]) == {96} and set(table["n_conditions"]) == {8}
    assert set(table["seed"].dropna()) == {4} and set(table["dataset"]) == {"toy"}
    best = table[(table["metric"] == "balanced_accuracy") & ~table["reduced"]].set_index("representation")["value"]
    assert best["genes"] > 0.9 and best["PCA"] > 0.6
    again = run(world, tmp_path / "again.csv", models, QUICK.model_copy(update={"dimensions": (3,)}))
    pd.testing.assert_frame_equal(table, again)
    save(draw(table), table, tmp_path / "probes")
    assert "chance" not in (tmp_path / "probes.svg").read_text() and (tmp_path / "probes.png").stat().st_size > 5000


def test_latents_of_scvi_and_vectors_from_a_file_are_probed(world, tmp_path):
    """The vectors tell the conditions apart, and only where each cell gets its own."""
    models = {"scvi_additive@4": world / "scvi_additive", "embedding_cells@4": world / "embedding_cells"}
    table = run(world, tmp_path / "probe.csv", models)
    found = table[table["metric"] == "balanced_accuracy"].set_index("representation")
    assert found.loc["scvi_additive", "n_dimensions"] == 6 and found.loc["embedding_cells", "n_dimensions"] == 5
    assert found.loc["embedding_cells", "value"] > 0.8
    assert found.loc["scvi_additive", "value"] > 2 * found.loc["scvi_additive", "chance_high"]
    vectors = pd.read_csv(world / "vectors.csv", index_col=0)
    kept = vectors.to_csv()
    try:
        shuffled = vectors.set_axis(np.random.default_rng(1).permutation(vectors.index))
        shuffled.to_csv(world / "vectors.csv")
        table = run(world, tmp_path / "shuffled.csv", {"embedding_cells@4": world / "embedding_cells"})
        row = table[table["metric"] == "balanced_accuracy"].set_index("representation").loc["embedding_cells"]
        assert row["value"] < row["chance_high"] + 0.1
    finally:
        (world / "vectors.csv").write_text(kept)


def test_cells_that_an_encoder_may_have_seen_are_refused(world, tmp_path):
    with pytest.raises(LeakageError, match="trained on another split"):
        run(world, tmp_path / "a.csv", {"p": world / "perturbedvae_elsewhere"})
    lines = (
        (world / "features.csv")
        .read_text()
        .replace(json.dumps(read_split(world / "split.csv").header["sha256"]), '"x"')
    )
    (tmp_path / "features.csv").write_text(lines)
    with pytest.raises(LeakageError, match="another split"):
        run(world, tmp_path / "b.csv", {}, features=tmp_path / "features.csv")
    assert not list(tmp_path.glob("?.csv"))


def test_methods_without_representation_and_thin_splits_are_refused(world, tmp_path):
    with pytest.raises(MethodError, match="no representation"):
        run(world, tmp_path / "a.csv", {"additive": world / "additive"})
    with pytest.raises(DataError, match="0 conditions have 50 test cells or more"):
        run(world, tmp_path / "a.csv", {}, QUICK.model_copy(update={"min_cells": 50}))


def test_a_cap_takes_so_many_cells_of_each_condition(world, tmp_path):
    table = run(world, tmp_path / "a.csv", {}, QUICK.model_copy(update={"max_cells": 10, "raw_genes": False}))
    assert set(table["n_cells"]) == {80} and set(table["representation"]) == {"PCA"}
