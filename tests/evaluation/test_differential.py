"""The differential test against scipy, statsmodels and scikit-learn, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from perturbed.evaluation.differential import Moments, adjust_bh, average_precision, welch_t


def cells(seed: int, n: int, genes: int = 12, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(0.5 + shift * (np.arange(genes) < 4), 1.0, (n, genes)), 0)


def test_moments() -> None:
    x, y = cells(0, 9), cells(1, 5)
    for matrix in (x, sparse.csr_matrix(x)):
        moments = Moments.of(matrix)
        np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, x.var(axis=0, ddof=1), rtol=1e-10)
    both = Moments.of(x) + Moments.of(y)
    np.testing.assert_allclose(both.variance, np.vstack([x, y]).var(axis=0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose((both - Moments.of(y)).mean, x.mean(axis=0), rtol=1e-10)
    assert np.isnan(Moments.of(x[:1]).variance).all()
    assert (Moments.of(np.full((7, 3), np.float32(0.1))).variance == 0).all()


def test_welch_against_scipy() -> None:
    x, y = cells(2, 20, shift=1.0), cells(3, 31)
    result = welch_t(Moments.of(sparse.csr_matrix(x)), Moments.of(y))
    expected = stats.ttest_ind(x, y, equal_var=False)
    np.testing.assert_allclose(result.t, expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(result.p, expected.pvalue, rtol=1e-8)
    np.testing.assert_allclose(result.effect, x.mean(axis=0) - y.mean(axis=0), rtol=1e-9)
    order = result.ranked()
    assert np.all(np.diff(np.abs(result.t)[order]) <= 0)


def test_welch_of_constant_genes() -> None:
    x, y = np.ones((5, 3)), np.ones((6, 3))
    x[:, 1] = 2.0  # constant and different
    y[:, 2] = np.arange(6)
    result = welch_t(Moments.of(x), Moments.of(y))
    assert result.t[0] == 0 and result.p[0] == 1
    assert np.isposinf(result.t[1]) and result.p[1] == 0
    assert np.isfinite(result.t[2]) and 0 < result.p[2] < 1
    assert result.ranked()[0] == 1
    with pytest.raises(ValueError, match="two cells"):
        welch_t(Moments.of(x[:1]), Moments.of(y))


def test_null_p_values_are_uniform() -> None:
    rng = np.random.default_rng(5)
    p = welch_t(Moments.of(rng.normal(size=(20, 4000))), Moments.of(rng.normal(size=(20, 4000)))).p
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert (adjust_bh(p) < 0.05).mean() < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.2, 0.2, 0.9, 1.0]), min_size=1, max_size=15))
def test_bh_against_statsmodels_and_by_definition(values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.array(values)
    q = adjust_bh(p)
    np.testing.assert_allclose(q, multipletests(p, method="fdr_bh")[1], rtol=1e-12)
    for level in (0.031, 0.053, 0.29):  # rejecting q < level is the step-up procedure
        passing = [k for k in range(1, len(p) + 1) if np.sort(p)[k - 1] <= level * k / len(p)]
        cut = np.sort(p)[max(passing) - 1] if passing else -1.0
        np.testing.assert_array_equal(q <= level + 1e-12, p <= cut)


def test_average_precision() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(7)
    for _ in range(20):
        labels = rng.random(30) < 0.3
        labels[0] = True
        scores = rng.integers(0, 8, 30).astype(float)  # many ties
        expected = average_precision_score(labels, scores)
        assert average_precision(labels, scores) == pytest.approx(expected, rel=1e-12)
    # by hand: order + - +  ->  1/2 · 1 + 1/2 · 2/3
    assert average_precision(np.array([1, 0, 1], bool), np.array([3.0, 2.0, 1.0])) == pytest.approx(0.5 + 1 / 3)
    # one tie of all is the prevalence
    assert average_precision(np.array([1, 0, 0, 0], bool), np.ones(4)) == pytest.approx(0.25)
