"""What every method file promises, whatever the method: one suite over all of `config/methods`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_cells import carried_weights, plant, reorder

from perturbed import training
from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import (
    ARRAYS,
    TENSORS,
    FitRun,
    Method,
    build,
    load_method_spec,
    load_model,
    method_class,
    save_model,
)
from perturbed.names import CONTROL
from quick_methods import QUICK, write_side_files

FOLDER = Path(__file__).parents[2] / "config" / "methods"
SKIPPED = {"external": "has no predictions of its own; see test_external.py"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PREDICTS_UNSEEN_GENES = {
    "no_change",
    "mean_effect",
    "matching_mean",
    "pca_ridge",
    "embedding",
    "nb_vae",
    "nb_vae_gaussian",
}
GENE_BLIND = {"no_change", "mean_effect"}
"""Methods that predict the same whatever is perturbed."""
NO_DRAWS = {"nb_vae_gaussian": {"direction": "knock_down"}}
"""Where a short fit would calibrate every change to nothing."""
ONE_STEP = {"random_forest"}
"""Methods that draw random numbers but do not train by epochs."""
TARGETS = [("G00", "all"), ("G01+G04", "all"), ("G00+G02+G05", "all"), (CONTROL, "all")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    planted = plant(n_cells=15, n_control=30, combos=("G00+G01",), counts=True).data
    cells = np.array([f"cell{i}" for i in range(len(planted.perturbation))], dtype=object)
    files = write_side_files(tmp_path_factory.mktemp("files"), planted.genes, cells, planted.X)
    return replace(planted, cells=cells, files=files)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    if request.param in SKIPPED:
        pytest.skip(SKIPPED[request.param])
    if load_method_spec(request.param, [FOLDER]).environment:
        pytest.skip("runs in an environment of its own; see its tests")
    return request.param


def fitted(name: str, data, seed: int = 0, **run) -> Method:
    method = build(load_method_spec(name, [FOLDER]), QUICK.get(name))
    method.check(data)
    method.fit(data, FitRun(seed=seed, progress=False, **run))
    return method


def at_means(name: str, data) -> Method:
    """A fitted method whose predictions hold no draws, so that two that are equal were asked the same."""
    method = build(load_method_spec(name, [FOLDER]), QUICK.get(name, {}) | NO_DRAWS.get(name, {}))
    if "predict" in method.Params.model_fields:
        method = method_class(load_method_spec(name, [FOLDER]))(method.params.model_copy(update={"predict": "mean"}))
    method.fit(data, FitRun(progress=False))
    return method


def save(folder: Path, name: str, method: Method) -> list[bytes]:
    save_model(folder, method, load_method_spec(name, [FOLDER]))
    assert sorted(file.name for file in folder.iterdir()) in (["config.json", ARRAYS], ["config.json", TENSORS])
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def test_every_file_names_its_class_and_valid_parameters():
    for name in NAMES:
        spec = load_method_spec(name, [FOLDER])
        cls = method_class(spec)
        assert cls.stochastic == spec.stochastic
        if name not in SKIPPED:
            build(spec)


def test_predictions_are_finite_named_and_shaped(name, data):
    method = fitted(name, data)
    prediction = method.predict(TARGETS)
    assert prediction.genes == data.genes == method.genes
    assert prediction.perturbation == tuple(perturbation for perturbation, _ in TARGETS)
    assert not prediction.refused
    assert prediction.mean.shape == (len(TARGETS), len(data.genes))
    for array in (prediction.mean, prediction.variance, *(prediction.cells or ())):
        assert array is None or np.isfinite(array).all()
    if prediction.variance is not None:
        assert (prediction.variance >= 0).all()


def test_save_and_load_give_the_same_predictions_and_the_same_bytes(name, data, tmp_path):
    method = fitted(name, data)
    bytes_ = save(tmp_path / "model", name, method)
    loaded = load_model(tmp_path / "model")
    one, two = method.predict(TARGETS, seed=3), loaded.predict(TARGETS, seed=3)
    np.testing.assert_array_equal(one.mean, two.mean)
    if one.cells is not None:
        np.testing.assert_array_equal(np.stack(one.cells), np.stack(two.cells))
    again = loaded.state()
    for key, value in method.state().items():
        assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(again[key]))
    assert save(tmp_path / "again", name, fitted(name, data)) == bytes_
    if (tmp_path / "model" / ARRAYS).is_file():
        assert set(np.load(tmp_path / "model" / ARRAYS, allow_pickle=False)) == set(method.state())
    else:
        assert set(torch.load(tmp_path / "model" / TENSORS, weights_only=True)) == set(method.state())


def test_the_seed_decides_and_nothing_else_does(name, data, tmp_path):
    torch.manual_seed(1)
    first = save(tmp_path / "a", name, fitted(name, data, seed=1))
    torch.manual_seed(2)
    assert save(tmp_path / "b", name, fitted(name, data, seed=1)) == first
    other = save(tmp_path / "c", name, fitted(name, data, seed=2))
    stochastic = load_method_spec(name, [FOLDER]).stochastic
    assert (other == first) is not stochastic


def test_an_interrupted_fit_resumes_to_the_same_bytes(name, data, tmp_path, monkeypatch):
    if name in ONE_STEP or not load_method_spec(name, [FOLDER]).stochastic:
        pytest.skip("fits in one step; there is nothing to resume")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(name, data, checkpoint=tmp_path / "checkpoint.pt", history=stop)
    rows: list[dict] = []
    resumed = fitted(name, data, checkpoint=tmp_path / "checkpoint.pt", history=lambda row: rows.append(dict(row)))
    whole: list[dict] = []
    through = fitted(name, data, history=lambda row: whole.append(dict(row)))
    assert save(tmp_path / "a", name, resumed) == save(tmp_path / "b", name, through)
    assert rows == whole


def test_the_order_of_genes_does_not_matter(name, data):
    """Weights are drawn by position: a gene's initial weights go with it, and nothing else may know its place."""
    order = np.random.default_rng(0).permutation(len(data.genes))
    one, moved = fitted(name, data), reorder(data, order)
    with carried_weights(order):
        other = fitted(name, moved)
    here, there = one.predict(TARGETS), other.predict(TARGETS)
    assert there.genes == tuple(data.genes[i] for i in order)
    np.testing.assert_allclose(there.mean, here.mean[:, order], atol=1e-4)
    with suppress(MethodError):  # not every method represents cells
        np.testing.assert_allclose(other.represent(moved.X), one.represent(data.X), atol=1e-3)


def test_every_gene_of_a_triple_counts_and_their_order_does_not(name, data):
    method = at_means(name, data)
    genes = ("G00", "G02", "G05")
    mean = {names: method.predict_one("+".join(names), "all")["mean"] for names in permutations(genes)}
    triple = mean[genes]
    for found in mean.values():
        np.testing.assert_allclose(found, triple, atol=1e-5)
    pairs = [method.predict_one("+".join(pair), "all")["mean"] for pair in combinations(genes, 2)]
    changes = [np.abs(pair - triple).max() for pair in pairs]
    assert max(changes) == 0 if name in GENE_BLIND else min(changes) > 1e-4
    # a combination of training is found under every spelling
    both = method.predict([("G00+G01", "all"), ("G01+G00", "all")]).mean
    np.testing.assert_array_equal(*both)


def test_unseen_genes_are_refused_by_name_or_predicted(name, data):
    method = fitted(name, data)
    if name in PREDICTS_UNSEEN_GENES:
        assert np.isfinite(method.predict_one("G20", "all")["mean"]).all()
        return
    with pytest.raises(UnseenPerturbationError, match="G20"):
        method.predict_one("G00+G20", "all")
    prediction = method.predict([("G00", "all"), ("G00+G20", "all")])
    assert prediction.perturbation == ("G00",)
    assert list(prediction.refused) == ["G00+G20"]


def test_the_other_half_of_a_prediction_batch_has_no_say(name, data):
    method = fitted(name, data)
    alone = method.predict([TARGETS[1]], seed=5).mean[0]
    np.testing.assert_array_equal(method.predict(TARGETS, seed=5).mean[1], alone)


def test_test_time_needs_no_training_data(name, data, tmp_path):
    save(tmp_path / "model", name, fitted(name, data))
    assert len(load_model(tmp_path / "model").predict(TARGETS).mean) == len(TARGETS)
