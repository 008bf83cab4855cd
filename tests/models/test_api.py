from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from planted_cells import Planted, only, plant

import perturbed
from perturbed.errors import ConfigError, DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, load_method_spec, load_model, save_model
from perturbed.models.baselines import Additive
from perturbed.models.perturbedvae import PerturbedVAE as Method
from perturbed.models.perturbedvae import PerturbedVAEParams

ROOT = Path(__file__).parents[2]
FOLDER, README = ROOT / "config" / "methods", ROOT / "README.md"
QUICK = {"n_nu": 4, "n_iota": 3, "n_hidden": 16, "epochs": 4, "lr": 3e-3, "n_samples": 0, "batch_size": 32}


def as_anndata(planted: Planted, shuffle_labels: bool = False) -> AnnData:
    data = planted.data
    labels = ["B+A" if name == "A+B" else name for name in data.perturbation] if shuffle_labels else data.perturbation
    obs = pd.DataFrame({"perturbation": labels, "tissue": data.context})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    found = AnnData(data.X.copy(), obs=obs, var=pd.DataFrame(index=list(data.genes)))
    if data.counts is not None:
        found.layers["counts"] = data.counts.copy()
    return found


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return as_anndata(plant(n_cells=25, n_control=40))


@pytest.fixture(scope="module")
def model(cells):
    return perturbed.PerturbedVAE(cells, **QUICK).fit(seed=3, progress=False)


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (block,) = [textwrap.dedent(block) for block in blocks if "perturbed.PerturbedVAE" in block]
    planted = plant(n_single=4, combos=("G01+G02",), n_cells=15, n_control=20).data
    cells = as_anndata(Planted(only(planted, planted.perturbation != "G00"), {}, np.zeros(0)))
    letters = str.maketrans({"G": None, "0": None, "1": "A", "2": "B", "3": "C"})
    cells.obs["perturbation"] = [name.translate(letters) for name in cells.obs["perturbation"]]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)
    assert list(names["means"].index) == ["A+B", "A+B+C"] and list(names["means"].columns) == list(cells.var_names)
    assert np.isfinite(names["means"].to_numpy()).all()
    assert names["z_iota"].shape == (cells.n_obs, names["model"].method.params.n_iota)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, perturbed; assert 'torch' not in sys.modules; assert perturbed.PerturbedVAE.fit"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        perturbed.nothing  # noqa: B018


def test_it_is_the_method_of_the_pipeline_to_the_bit(model, cells, tmp_path):
    method = Method(PerturbedVAEParams(**QUICK))
    data = plant(n_cells=25, n_control=40, val_fraction=0.0).data
    method.fit(data, FitRun(seed=3, progress=False))
    expected = method.predict_one("G01+G02", "all")["mean"]
    np.testing.assert_array_equal(model.predict(["G01+G02"]).to_numpy()[0], expected)
    spec = load_method_spec("perturbedvae", [FOLDER])
    save_model(tmp_path / "pipeline", method, spec, {"dataset": "d"})
    loaded = perturbed.PerturbedVAE.load(tmp_path / "pipeline", cells)
    np.testing.assert_array_equal(loaded.predict(["G01+G02"]).to_numpy()[0], expected)
    assert loaded.get_latent_representation().shape == (cells.n_obs, 3)
    model.save(tmp_path / "api")
    np.testing.assert_array_equal(load_model(tmp_path / "api").predict_one("G01+G02", "all")["mean"], expected)


def test_only_nu_sees_the_label(model, cells):
    other = cells.copy()
    other.obs["perturbation"] = "G00"
    for kind, width, same in (("iota", 3, True), ("encoder", 16, True), ("nu", 4, False)):
        here, there = (model.get_latent_representation(a, kind) for a in (cells, other))
        assert here.shape == (cells.n_obs, width)
        assert np.array_equal(here, there) is same
    with pytest.raises(MethodError, match="kind"):
        model.get_latent_representation(cells, "z")


def test_genes_are_found_by_name_and_missing_ones_named(model, cells):
    order = np.random.default_rng(0).permutation(cells.n_vars)
    np.testing.assert_array_equal(
        model.get_latent_representation(cells[:, order].copy()), model.get_latent_representation(cells)
    )
    with pytest.raises(DataError, match="'G05'"):
        model.get_latent_representation(cells[:, cells.var_names != "G05"].copy())


def test_labels_are_canonical_and_any_number_of_genes_is_predicted(model):
    found = model.predict(["G02+G00", "G00+G02", "G03+G01+G02+G00", "control"])
    assert list(found.index) == ["G00+G02", "G00+G02", "G00+G01+G02+G03", "control"]
    np.testing.assert_array_equal(found.iloc[0], found.iloc[1])
    with pytest.raises(UnseenPerturbationError, match="G40"):
        model.predict(["G00+G40"])


def test_generated_cells_scatter_about_the_mean(model):
    found = model.predict(["G00+G01", "G02"], n_cells=300, seed=1)
    assert found.shape == (600, 50)
    assert list(found.obs["perturbation"].value_counts()) == [300, 300]
    assert list(found.var_names) == [f"G{i:02d}" for i in range(50)]
    for name in ("G00+G01", "G02"):
        cells = found[(found.obs["perturbation"] == name).to_numpy()].X
        error = (cells.mean(axis=0) - model.predict([name]).to_numpy()[0]) / (cells.std(axis=0) / np.sqrt(300))
        assert np.abs(error).max() < 6
    np.testing.assert_array_equal(found.X, model.predict(["G00+G01", "G02"], n_cells=300, seed=1).X)


def test_predictions_start_from_the_control_cells_they_are_given(model, cells):
    control = cells[cells.obs["perturbation"] == "control"].copy()
    same = model.predict(["G00"], control_cells=control).to_numpy()
    np.testing.assert_allclose(same, model.predict(["G00"]).to_numpy(), atol=0.05)
    moved = control.copy()
    moved.X = moved.X * 3
    assert not np.allclose(model.predict(["G00"], control_cells=moved).to_numpy(), same, atol=1e-3)
    with pytest.raises(MethodError, match="control_cells"):
        model.predict(["G00"], control_cells=control[:0].copy())


def test_contexts_are_named():
    adata = as_anndata(plant(contexts=("a", "b"), n_cells=15, n_control=20, n_single=3))
    model = perturbed.PerturbedVAE(adata, context_key="tissue", **QUICK).fit(progress=False)
    assert model.predict(["G00"], context="b").shape == (1, 50)
    with pytest.raises(MethodError, match="a, b"):
        model.predict(["G00"])


def test_own_columns_layers_and_counts():
    adata = as_anndata(plant(counts=True, n_cells=15, n_control=20, n_single=3))
    adata.obs["guide"] = adata.obs.pop("perturbation").replace("control", "NT")
    adata.layers["log"], adata.X = adata.X, adata.layers["counts"]
    keys = {"perturbation_key": "guide", "control": "NT", "layer": "log"}
    with pytest.raises(DataError, match="whole numbers"):
        perturbed.PerturbedVAE(adata, "guide", "NT", **QUICK)
    with pytest.raises(DataError, match="counts_layer"):
        perturbed.PerturbedVAE(adata, **keys, likelihood="nb", **QUICK)
    model = perturbed.PerturbedVAE(adata, **keys, counts_layer="counts", likelihood="nb", **QUICK).fit(progress=False)
    control = adata[adata.obs["guide"] == "NT"].copy()
    assert np.isfinite(model.predict(["G00", "NT"], control_cells=control).to_numpy()).all()
    assert model.predict(["G00"], n_cells=5).obs["guide"].tolist() == ["G00"] * 5


def test_matched_partners_and_validation_cells_need_nothing_more(cells):
    model = perturbed.PerturbedVAE(cells, partners="matched_pca", **QUICK)
    model.fit(validation_size=0.2, progress=False)
    assert {"loss", "kl_iota", "active_iota", "val_loss"} <= set(model.history.columns)
    assert len(model.history) == QUICK["epochs"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a: {"perturbation_key": "gene"}, DataError, "no column 'gene'"),
        (lambda a: {"layer": "log"}, DataError, "no layer 'log'"),
        (lambda a: {"control": "NT"}, None, ""),
        (lambda a: {"n_mu": 3}, ConfigError, "n_mu"),
        (lambda a: {"context_key": "perturbation"}, MethodError, "no control cells"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cells, change, kind, message):
    if kind is None:  # the pipeline's own name of control cells is always understood
        perturbed.PerturbedVAE(cells, **change(cells), **QUICK)
        return
    with pytest.raises(kind, match=message) as caught:
        perturbed.PerturbedVAE(cells, **change(cells), **QUICK)
    assert "\n" not in str(caught.value)


def test_an_unfitted_a_loaded_and_a_foreign_model_say_so(cells, model, tmp_path):
    with pytest.raises(MethodError, match="not fitted"):
        perturbed.PerturbedVAE(cells, **QUICK).predict(["G00"])
    model.save(tmp_path / "model")
    loaded = perturbed.PerturbedVAE.load(tmp_path / "model")
    for call in (loaded.fit, loaded.get_latent_representation):
        with pytest.raises(MethodError, match="loaded"):
            call()
    foreign = Additive()
    foreign.fit(plant(n_cells=5, n_control=5).data, FitRun())
    save_model(tmp_path / "additive", foreign, load_method_spec("additive", [FOLDER]))
    with pytest.raises(DataError, match="Additive"):
        perturbed.PerturbedVAE.load(tmp_path / "additive")
    with pytest.raises(MethodError, match="validation_size"):
        perturbed.PerturbedVAE(cells, **QUICK).fit(validation_size=1.0)


def test_scaled_or_missing_values_are_refused(cells):
    scaled = cells.copy()
    scaled.X = scaled.X.toarray() - 1.0
    with pytest.raises(DataError, match="negative"):
        perturbed.PerturbedVAE(scaled, **QUICK)
    twice = cells.copy()
    twice.var_names = ["G00", *twice.var_names[:-1]]
    with pytest.raises(DataError, match="repeats"):
        perturbed.PerturbedVAE(twice, **QUICK)
