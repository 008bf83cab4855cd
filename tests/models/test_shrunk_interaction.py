"""`shrunk_interaction` and `shrunk_saturating` on planted effects and interactions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from planted_cells import only, plant
from scipy import sparse

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.baselines import Additive
from perturbed.models.interaction import (
    add_on_link,
    curvature,
    fit_interaction,
    product_kernel,
    saturation,
    shared_kernel,
)
from perturbed.models.shrunk_interaction import ShrunkInteraction, ShrunkInteractionParams
from perturbed.models.shrunk_saturating import ShrunkSaturating, saturate
from perturbed.names import CONTROL, genes_of, join_genes

ADDITIVE = ShrunkInteractionParams(saturation=0.0, link_offset=1.0)  # as the worlds below are made


def world(
    n_single: int = 24, n_genes: int = 120, size: float = 1.0, kind: str = "additive", seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Noise-free means of control, singles and all doubles; three programs, a few direct targets."""
    rng = np.random.default_rng([seed, 3])
    base = rng.uniform(2.0, 4.0, n_genes)
    programs = rng.normal(0, 0.25, (3, n_genes))
    scores = rng.normal(0, 1.0, (n_single, 3)) + np.array([0.8, 0, 0])
    effect = size * (scores @ programs)
    effect[np.arange(n_single), np.arange(n_single)] += size
    bilinear = 0.3 * rng.normal(size=(3, 3, n_genes))
    means = {CONTROL: base} | {f"G{i:03d}": base + effect[i] for i in range(n_single)}
    for i, j in combinations(range(n_single), 2):
        extra = {
            "additive": np.zeros(n_genes),
            "synergy": 0.8 * effect[i] * effect[j],
            "bilinear": np.einsum("i,j,ijg->g", scores[i], scores[j], bilinear + bilinear.transpose(1, 0, 2)) / 2,
        }[kind]
        means[join_genes([f"G{i:03d}", f"G{j:03d}"])] = base + effect[i] + effect[j] + extra
    return means, base


def cells_of(means: dict[str, np.ndarray], names: list[str], n: int, seed: int = 0) -> TrainingData:
    """`n` cells of each condition with a common program (a cell cycle) in their noise."""
    rng = np.random.default_rng([seed, 5])
    n_genes = len(means[CONTROL])
    cycle = rng.normal(0, 0.4, n_genes)
    labels = np.repeat(np.array(names, dtype=object), n)
    noise = 0.6 * rng.normal(size=(len(labels), n_genes)) + rng.normal(size=(len(labels), 1)) * cycle
    expression = np.stack([means[name] for name in labels]) + noise
    return TrainingData(
        X=sparse.csr_matrix(expression.astype(np.float32)),
        perturbation=labels,
        context=np.full(len(labels), "all"),
        is_val=np.zeros(len(labels), dtype=bool),
        genes=tuple(f"G{i:03d}" for i in range(n_genes)),
        centre=np.zeros(n_genes),
        loadings=np.zeros((n_genes, 1)),
    )


def fitted(data: TrainingData, params: ShrunkInteractionParams = ADDITIVE) -> ShrunkInteraction:
    method = ShrunkInteraction(params)
    method.fit(data, FitRun())
    return method


def error(method, means: dict[str, np.ndarray], names: list[str]) -> float:
    return float(np.mean([np.linalg.norm(method.predict_one(name, "all")["mean"] - means[name]) for name in names]))


def split_names(means: dict[str, np.ndarray], n_train: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Control and singles, training doubles and others."""
    singles = [name for name in means if len(genes_of(name)) < 2]
    doubles = np.random.default_rng([seed, 7]).permutation([name for name in means if len(genes_of(name)) == 2])
    return singles, list(doubles[:n_train]), list(doubles[n_train : n_train + 60])


def test_denoised_profiles_halve_the_error_of_the_additive_baseline():
    means, base = world()
    singles, _, tested = split_names(means, 0)
    data = cells_of(means, singles, 30)
    additive = Additive()
    additive.fit(data, FitRun())
    ours = fitted(data)
    assert error(ours, means, tested) < 0.5 * error(additive, means, tested)
    kept = fitted(data, replace_params(denoise_control=False))
    assert error(ours, means, tested) < error(kept, means, tested)  # the control's noise enters every double
    assert np.linalg.norm(ours.predict_one(CONTROL, "all")["mean"] - base) < np.linalg.norm(
        kept.predict_one(CONTROL, "all")["mean"] - base
    )


def replace_params(**changes) -> ShrunkInteractionParams:
    return ADDITIVE.model_copy(update=changes)


def test_no_effect_is_predicted_where_there_is_none():
    means, _ = world(size=0.0, n_genes=600)
    singles, _, tested = split_names(means, 0)
    data = cells_of(means, singles, 30)
    additive = Additive()
    additive.fit(data, FitRun())
    for params in (ADDITIVE, ShrunkInteractionParams()):
        ours = fitted(data, params)
        control = ours.predict_one(CONTROL, "all")["mean"]
        size = np.mean([np.linalg.norm(ours.predict_one(name, "all")["mean"] - control) for name in tested])
        noise = np.mean([np.linalg.norm(additive.predict_effect(name)) for name in tested])
        assert size < 0.2 * noise, size / noise


@pytest.mark.parametrize("kind", ["synergy", "bilinear"])
def test_a_planted_interaction_is_learnt_from_doubles_beyond_the_noise_free_sum(kind):
    means, base = world(kind=kind)
    singles, trained, tested = split_names(means, 80)
    sums = {name: base + sum(means[g] - base for g in genes_of(name)) for name in tested}
    noise_free = float(np.mean([np.linalg.norm(sums[name] - means[name]) for name in tested]))
    data = cells_of(means, singles + trained, 100)
    learnt = fitted(data)
    assert error(learnt, means, tested) < 0.8 * noise_free
    alone = fitted(data, replace_params(learn_interaction=False))
    assert error(learnt, means, tested) < 0.8 * error(alone, means, tested)


def test_nothing_is_learnt_from_doubles_that_only_add():
    means, _ = world()
    singles, trained, tested = split_names(means, 40)
    data = cells_of(means, singles + trained, 30)
    alone = fitted(data, replace_params(learn_interaction=False))
    assert error(fitted(data), means, tested) < 1.1 * error(alone, means, tested)


def test_prior_shortens_long_sums():
    total = np.array([3.0, 4.0])
    assert saturation(total, 0.5, 5.0) == 1.0
    assert saturation(4 * total, 0.5, 5.0) == 0.5
    assert saturation(total, 0.0, 2.0) == saturation(0 * total, 0.5, 5.0) == 1.0


def test_effects_that_multiply_expression_add_on_the_link():
    rng = np.random.default_rng(3)
    rate = rng.uniform(0.5, 20, 50)
    folds = np.exp(rng.normal(0, 0.7, (3, 50)))
    background, alone = np.log1p(rate), np.log1p(rate * folds)
    expected = np.log1p(rate * folds.prod(axis=0)) - background
    np.testing.assert_allclose(add_on_link(alone - background, background, 1e-12), expected, atol=1e-9)
    halfway = np.log1p(rate * np.sqrt(folds.prod(axis=0))) - background
    np.testing.assert_allclose(add_on_link(alone - background, background, 1e-12, 0.5), halfway, atol=1e-9)
    # Offset 1 is the plain sum, and one near 1 is near it; one effect alone is kept whatever the offset.
    total = (alone - background).sum(axis=0)
    np.testing.assert_allclose(add_on_link(alone - background, background, 1.0), total)
    inside = background + total > 0
    np.testing.assert_allclose(add_on_link(alone - background, background, 1 - 1e-9)[inside], total[inside], atol=1e-6)
    np.testing.assert_allclose(add_on_link((alone - background)[:1], background, 0.1), (alone - background)[0])
    # Genes that are off, before or after, stay finite and never negative.
    silent = background + add_on_link(-2 * np.stack([background] * 2), background, 0.1)
    np.testing.assert_allclose(silent, 0.0, atol=1e-12)
    assert np.isfinite(add_on_link(np.full((2, 3), 0.5), np.array([-0.01, 0.0, 1e-9]), 0.1)).all()


def test_kernels_are_inner_products_of_the_features_they_stand_for():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 4))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    sets = [np.array(s) for s in ((0, 1), (1, 2), (3, 4), (0, 2, 5))]

    def bilinear(rows: np.ndarray) -> np.ndarray:
        return sum(np.outer(z[a], z[b]) + np.outer(z[b], z[a]) for a, b in combinations(rows, 2)).ravel() / np.sqrt(2)

    features = np.stack([bilinear(rows) for rows in sets])
    np.testing.assert_allclose(product_kernel(sets, sets, z @ z.T), features @ features.T, atol=1e-12)
    held = np.array([[gene in rows for gene in range(6)] for rows in sets], dtype=float)
    np.testing.assert_array_equal(shared_kernel(sets, sets), held @ held.T)


def test_curvature_of_three_sums_over_pairs():
    a, b, c = effects = np.random.default_rng(1).normal(size=(3, 7))
    background = np.array([0.0, 0.01, 0.5, 1, 2, 3, 4])
    total, even, odd, linked_even, linked_odd = curvature(effects, background)
    np.testing.assert_allclose(total, a + b + c)
    np.testing.assert_allclose(even, a * b + a * c + b * c)
    pairs = ((a, b), (a, c), (b, c))
    np.testing.assert_allclose(odd, sum(np.abs(x) * y + np.abs(y) * x for x, y in pairs))
    slope = np.maximum(1 - np.exp(-background), 0.05)
    np.testing.assert_allclose([linked_even, linked_odd], [even / slope, odd / slope])


def test_the_evidence_finds_the_kernel_that_made_the_residuals():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(60, 4))
    kernel = features @ features.T
    other = np.kron(np.eye(20), np.ones((3, 3)))
    drawn = np.linalg.cholesky(kernel + np.eye(60)) @ rng.normal(size=(60, 40))
    fit = fit_interaction(np.zeros((60, 5, 40)), np.stack([other, kernel]), drawn)
    assert fit.share[1] == pytest.approx(1.0, rel=0.3)
    assert fit.share[0] < 0.1
    expected = kernel[:5] @ np.linalg.solve(kernel + np.eye(60), drawn)
    found = np.stack([fit.predict(np.zeros((5, 40)), np.stack([other[i], kernel[i]])) for i in range(5)])
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    null = fit_interaction(np.zeros((60, 5, 40)), np.stack([other, kernel]), rng.normal(size=(60, 40)))
    assert (null.share < 0.05).all()


def test_few_conditions_few_cells_and_three_genes():
    data = plant(n_single=3, n_cells=10, combos=("G00+G01",)).data
    for n_conditions in ({CONTROL, "G00", "G01"}, {CONTROL, "G00", "G01", "G02", "G00+G01"}, {CONTROL}):
        ours = fitted(only(data, np.isin(data.perturbation, list(n_conditions))), ShrunkInteractionParams())
        for target in (CONTROL, "G00+G01", "G00+G01+G02"):
            if set(genes_of(target)) <= n_conditions:
                assert np.isfinite(ours.predict_one(target, "all")["mean"]).all()
    first = np.array([i for i, p in enumerate(data.perturbation) if p == CONTROL or p not in data.perturbation[:i]])
    single_cells = only(data, first)
    assert np.isfinite(fitted(single_cells).predict_one("G01+G02", "all")["mean"]).all()
    with pytest.raises(MethodError, match="two training cells"):
        fitted(only(data, np.unique(data.perturbation, return_index=True)[1]))


def test_contexts_keep_their_backgrounds_and_lend_their_effects():
    data = plant(contexts=("a", "b"), n_cells=20).data
    ours = fitted(only(data, (data.context == "a") | (data.perturbation == CONTROL)))
    control = data.X[(data.perturbation == CONTROL) & (data.context == "b")].toarray().mean(axis=0)
    np.testing.assert_allclose(ours.predict_one(CONTROL, "b")["mean"], control, atol=1e-6)
    effects = [ours.predict_one("G01+G02", c)["mean"] - ours.predict_one(CONTROL, c)["mean"] for c in "ab"]
    np.testing.assert_allclose(*effects, atol=1e-10)
    with pytest.raises(MethodError, match="context 'c'"):
        ours.predict_one("G01", "c")


@pytest.mark.parametrize("method", [ShrunkInteraction, ShrunkSaturating])
def test_a_gene_seen_in_combinations_only_is_refused(method):
    data = plant(combos=("G00+G01",)).data
    model = method()
    model.fit(only(data, data.perturbation != "G01"), FitRun())
    assert np.isfinite(model.predict_one("G00+G01", "all")["mean"]).all()
    with pytest.raises(UnseenPerturbationError, match="G01 perturbed alone"):
        model.predict_one("G01+G02", "all")


def test_the_number_of_cells_decides_how_much_is_kept():
    means, _ = world(size=0.3)
    singles, _, tested = split_names(means, 0)
    sizes = []
    for n in (5, 50, 1000):
        ours = fitted(cells_of(means, singles, n))
        effect = ours.predict_one("G001", "all")["mean"] - ours.predict_one(CONTROL, "all")["mean"]
        sizes.append(np.linalg.norm(effect) / np.linalg.norm(means["G001"] - means[CONTROL]))
    assert sizes[2] == pytest.approx(1, abs=0.1)
    assert error(fitted(cells_of(means, singles, 1000)), means, tested) < 0.5 * error(
        fitted(cells_of(means, singles, 50)), means, tested
    )


def test_shrunk_saturating_is_its_recipe():
    data = plant(n_single=6, n_cells=12, n_control=20, val_fraction=0.0).data
    model = ShrunkSaturating()
    model.fit(data, FitRun())
    X = data.X.toarray().astype(float)
    names = sorted(set(data.perturbation) - {CONTROL})
    cells = {name: X[data.perturbation == name] for name in (CONTROL, *names)}
    within = sum(((c - c.mean(axis=0)) ** 2).sum(axis=0) for c in cells.values()) / (len(X) - len(cells))
    error_ = np.sqrt(within * (1 / 12 + 1 / 20))
    z = np.stack([(cells[name].mean(axis=0) - cells[CONTROL].mean(axis=0)) / error_ for name in names])
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    m, n = z.shape
    y = s / np.sqrt(n)
    shrunk = np.sqrt(n) * np.sqrt(np.maximum((y**2 - m / n - 1) ** 2 - 4 * m / n, 0)) / y * (y > 1 + np.sqrt(m / n))
    low = (u * shrunk) @ vt
    rest = z - low
    effect = (low + rest * np.maximum(1 - 1 / rest**2, 0)) * error_
    a, b = effect[names.index("G01")], effect[names.index("G04")]
    joined = np.where(a * b > 0, np.sign(a) * np.sqrt(a**2 + b**2), a + b)
    expected = cells[CONTROL].mean(axis=0) + joined
    np.testing.assert_allclose(model.predict_one("G01+G04", "all")["mean"], expected, atol=1e-5)
    pair, third = np.array([[3.0, 3, -3], [4.0, -4, -4]]), np.array([[12.0, 4, 0]])
    np.testing.assert_allclose(saturate(pair), [5, -1, -5])
    np.testing.assert_allclose(saturate(np.vstack([third, pair])), [13, 1, -5])
