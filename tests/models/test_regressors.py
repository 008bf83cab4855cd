from __future__ import annotations

import numpy as np
import pytest
from planted_cells import only, plant
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import ElasticNet
from sklearn.neighbors import KNeighborsRegressor

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun
from perturbed.models.baselines import Additive, MatchingMean, MeanEffect, measure_effects
from perturbed.models.regressors import (
    ElasticNetParams,
    ForestParams,
    LinearElasticNet,
    NearestNeighbours,
    NearestNeighboursParams,
    RandomForest,
)

ALL = (NearestNeighbours, LinearElasticNet, RandomForest)
DOUBLE, TRIPLE = "G01+G04", "G00+G02+G05"


@pytest.fixture(scope="module")
def data():
    return plant(n_cells=12, n_control=30, combos=("G00+G01", "G03+G06")).data


@pytest.fixture(scope="module")
def design(data):
    """Multi-hot features and effects, control first, written out."""
    effects = measure_effects(data)
    seen = sorted({gene for name in effects.perturbations for gene in name.split("+")})
    rows = [[float(gene in name.split("+")) for gene in seen] for name in effects.perturbations]
    x = np.vstack([np.zeros(len(seen)), rows])
    return seen, x, np.vstack([np.zeros(effects.effect.shape[1]), effects.effect])


def fitted(method, data, seed: int = 0, threads: int = 1):
    method.fit(data, FitRun(seed=seed, threads=threads))
    return method


def hot(seen, name) -> np.ndarray:
    return np.array([[float(gene in name.split("+")) for gene in seen]])


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbours_are_scikit_learns_where_no_distances_tie(data, weights):
    params = NearestNeighboursParams(features="pca", n_neighbors=3, weights=weights, n_components=None)
    method = fitted(NearestNeighbours(params), data)
    effects = measure_effects(data)
    x = np.vstack([np.zeros(method._x.shape[1]), *(method._describe(name) for name in effects.perturbations)])
    y = np.vstack([np.zeros(effects.effect.shape[1]), effects.effect])
    theirs = KNeighborsRegressor(3, weights=weights).fit(x, y)
    for name in (DOUBLE, TRIPLE, "G00+G01", "G20"):
        expected = theirs.predict(method._describe(name)[None])[0]
        np.testing.assert_allclose(method.predict_effect(name), expected, atol=1e-10)


def test_neighbours_of_a_combination_are_its_genes_single_perturbations(data):
    params = NearestNeighboursParams(n_components=None)
    method, mean = fitted(NearestNeighbours(params), data), fitted(MatchingMean(), data)
    for name in (
        DOUBLE,
        TRIPLE,
        "G02",
        "G00+G01",
    ):  # ties count: three neighbours for a triple; what was seen is itself
        np.testing.assert_allclose(method.predict_effect(name), mean.predict_effect(name), atol=1e-10)


def test_elastic_net_is_scikit_learns(data, design):
    seen, x, y = design
    method = fitted(LinearElasticNet(ElasticNetParams(n_components=None, alpha=2e-3, l1_ratio=0.3)), data)
    theirs = ElasticNet(alpha=2e-3, l1_ratio=0.3, max_iter=10_000, tol=1e-6).fit(x, y - y.mean(axis=0))
    for name in (DOUBLE, TRIPLE, "G00"):
        expected = theirs.predict(hot(seen, name))[0] + y.mean(axis=0)
        np.testing.assert_allclose(method.predict_effect(name), expected, atol=1e-8)


def test_elastic_net_lies_between_additive_and_one_effect_for_all(data):
    additive = fitted(Additive(), data)
    nearly_free = fitted(LinearElasticNet(ElasticNetParams(n_components=None, alpha=1e-9)), plant(n_cells=12).data)
    singles = fitted(Additive(), plant(n_cells=12).data)
    np.testing.assert_allclose(nearly_free.predict_effect(DOUBLE), singles.predict_effect(DOUBLE), atol=1e-4)
    shrunk = fitted(LinearElasticNet(ElasticNetParams(alpha=10.0)), data)
    n = len(additive._effects.perturbations)
    mean = fitted(MeanEffect(), data).predict_effect(DOUBLE)
    expected = mean * n / (n + 1)  # control is one more condition, without effect
    np.testing.assert_allclose(shrunk.predict_effect(DOUBLE), expected, atol=1e-10)


@pytest.mark.parametrize("features", ["multi_hot", "pca"])
def test_forest_of_arrays_predicts_as_scikit_learns(data, features):
    params = ForestParams(features=features, n_trees=20, n_components=4, max_features=0.5, min_samples_leaf=2)
    method = fitted(RandomForest(params), data, seed=5)
    effects = measure_effects(data)
    names = effects.perturbations
    x = np.vstack([0 * method._describe(names[0]), *(method._describe(name) for name in names)])
    y = np.vstack([np.zeros(effects.effect.shape[1]), effects.effect])
    centred = y - y.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:4]
    theirs = RandomForestRegressor(20, random_state=5, max_features=0.5, min_samples_leaf=2)
    theirs.fit(x.astype(np.float32), centred @ axes.T)
    for name in [DOUBLE, TRIPLE, *names]:
        expected = theirs.predict(method._describe(name)[None])[0] @ axes + y.mean(axis=0)
        np.testing.assert_allclose(method.predict_effect(name), expected, atol=1e-10)


def test_forest_does_not_depend_on_threads(data):
    one, two = (fitted(RandomForest(ForestParams(n_trees=8)), data, threads=n).state() for n in (1, 2))
    assert all(np.array_equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("cls", ALL)
def test_all_components_are_as_good_as_the_genes(data, cls):
    full = fitted(cls(cls.Params(n_components=None)), data)
    turned = fitted(cls(cls.Params(n_components=1000)), data)
    few = fitted(cls(cls.Params(n_components=2)), data)
    if cls is not LinearElasticNet:  # the L1 norm is not blind to rotation
        np.testing.assert_allclose(turned.predict_effect(DOUBLE), full.predict_effect(DOUBLE), atol=1e-8)
    assert turned._components.shape[0] == len(turned._effects.perturbations)  # rank of the effects and control, centred
    assert np.abs(few.predict_effect(DOUBLE) - full.predict_effect(DOUBLE)).max() > 1e-3


@pytest.mark.parametrize("cls", ALL)
def test_genes_without_features_are_refused(data, cls):
    hot_, embedded = fitted(cls(), data), fitted(cls(cls.Params(features="pca")), data)
    with pytest.raises(UnseenPerturbationError, match=f"{cls.__name__} never saw G20"):
        hot_.predict_effect("G00+G20")
    assert np.isfinite(embedded.predict_effect("G00+G20")).all()
    with pytest.raises(UnseenPerturbationError, match="no expression of STRANGER"):
        embedded.predict_effect("G00+STRANGER")


def test_a_gene_seen_only_in_a_combination_has_a_feature():
    data = plant(n_single=4, n_cells=10, combos=("G02+G03",)).data
    keep = data.perturbation != "G03"
    method = fitted(LinearElasticNet(ElasticNetParams(alpha=1e-6)), only(data, keep))
    assert np.isfinite(method.predict_effect("G01+G03")).all()


@pytest.mark.parametrize("cls", ALL)
def test_effects_linear_in_the_genes_are_learnt(cls):
    """Noise-free additive effects, all pairs but the tested one in training: what is linear must win over the mean."""
    planted = plant(n_single=6, n_cells=60, n_control=300, combos=tuple(
        f"G{i:02d}+G{j:02d}" for i in range(6) for j in range(i + 1, 6) if (i, j) != (1, 4)
    ))  # fmt: skip
    method, mean = fitted(cls(), planted.data), fitted(MeanEffect(), planted.data)
    truth = planted.doubles[DOUBLE] - planted.control
    ours, floor = (np.linalg.norm(m.predict_effect(DOUBLE) - truth) for m in (method, mean))
    assert ours < (0.5 if cls is LinearElasticNet else 0.9) * floor


def test_only_control_cells_are_one_line(data):
    with pytest.raises(MethodError, match="needs perturbed training cells"):
        fitted(LinearElasticNet(), only(data, data.perturbation == "control"))
