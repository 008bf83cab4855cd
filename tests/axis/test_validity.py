"""Measures of validity against slow or known implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from perturbed.axis.baselines import _design, fit_variance_prior, moderated_t
from perturbed.axis.validity import (
    _p,
    adjust_fdr,
    area_under_roc,
    average_precision,
    measure_recovery,
    quantiles,
    spearman,
    top_overlap,
)


def test_areas_equal_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = np.round(rng.normal(size=60), 1)
        positive = rng.random(60) < 0.3
        np.testing.assert_allclose(average_precision(score, positive), average_precision_score(positive, score))
        np.testing.assert_allclose(area_under_roc(score, positive), roc_auc_score(positive, score))
    assert np.isnan(average_precision(score, np.zeros(60, bool))) and np.isnan(area_under_roc(score, np.ones(60, bool)))


def test_recovery_of_direction_looks_at_planted_genes_only():
    effect = np.array([1.0, 2.0, -1.0, 0.0, 0.0])
    found = measure_recovery(np.array([0.5, 0.4, -0.9, 0.8, -0.8]), effect)
    assert found["auroc_direction"] == 1.0 and found["auroc"] == pytest.approx(2 / 6)
    assert measure_recovery(-np.array([0.5, 0.4, -0.9, 0.8, -0.8]), effect)["auroc_direction"] == 0.0


def test_ranks_and_overlap():
    rng = np.random.default_rng(1)
    a, b = np.round(rng.normal(size=(2, 50)), 1)
    np.testing.assert_allclose(spearman(a, b), stats.spearmanr(a, b).statistic)
    assert top_overlap(np.array([3.0, -4, 0, 1]), np.array([0.0, -1, 2, 0.5]), 2) == 0.5
    draws = rng.normal(size=(3, 100))
    draws[1, 5] = np.nan
    np.testing.assert_allclose(quantiles(draws, 0.9)[0], np.quantile(draws[0], [0.05, 0.95]))
    np.testing.assert_allclose(quantiles(draws, 0.9)[1], np.nanquantile(draws[1], [0.05, 0.95]))


def test_false_discovery_rates_equal_scipys():
    p = np.random.default_rng(2).random(40) ** 3
    with_gap = np.insert(p, 7, np.nan)
    found = adjust_fdr(with_gap)
    assert np.isnan(found[7])
    np.testing.assert_allclose(np.delete(found, 7), stats.false_discovery_control(p))


def test_p_counts_permutations_at_least_as_extreme():
    observed = np.array([2.0, -1.0, 0.0])
    permuted = np.array([[2.0, -2.0, 0.5, 3.0], [0.1, 0.9, -1.0, 0.2], [1.0, 1, 1, 1]])
    np.testing.assert_allclose(_p(observed, permuted, exact=True), [3 / 4, 1 / 4, 1.0])
    np.testing.assert_allclose(_p(observed, permuted, exact=False), [4 / 5, 2 / 5, 1.0])


# --- differential expression by donor ---------------------------------------------------------------------------------


def test_moderated_t_lies_between_ordinary_and_common_variance():
    rng = np.random.default_rng(3)
    arm = np.repeat([0, 1], 4)
    design = np.column_stack([np.ones(8), arm])
    variance = 0.3 * 8 / rng.chisquare(8, size=3000)  # a scaled inverse chi-squared prior of 8 degrees of freedom
    y = rng.normal(size=(8, 3000)) * np.sqrt(variance)
    y[:, 5] += 4 * arm
    y[:, 7] = 1.0
    t, p = moderated_t(y, design, 1)
    residual = np.array([y[arm == k].var(axis=0, ddof=1) for k in (0, 1)]).mean(axis=0)
    freedom, scale = fit_variance_prior(np.delete(residual, 7), 6)
    assert 5 < freedom < 13 and 0.25 < scale < 0.36
    slow = (y[4:, 5].mean() - y[:4, 5].mean()) / np.sqrt((freedom * scale + 6 * residual[5]) / (freedom + 6) / 2)
    np.testing.assert_allclose(t[5], slow, rtol=1e-6)
    np.testing.assert_allclose(p[5], 2 * stats.t.sf(abs(slow), 6 + freedom), rtol=1e-6)
    assert t[7] == 0 and p[7] == 1
    null = np.delete(p, [5, 7])
    assert stats.kstest(null, "uniform").pvalue > 0.01  # ordinary t of 4 against 4 would pass, too; z would not


def test_studies_are_adjusted_for_where_that_leaves_the_arm():
    arm = np.array([0, 0, 1, 0, 1, 1])
    crossed = np.array(list("aaabbb"), dtype=object)
    assert _design(arm, crossed).shape == (6, 3)
    assert _design(arm, np.where(arm, "a", "b").astype(object)).shape == (6, 2)
    assert _design(arm, np.array([""] * 6, dtype=object)).shape == (6, 2)
    y = (2.0 * arm + 10.0 * (crossed == "b"))[:, None] + np.random.default_rng(0).normal(0, 0.1, (6, 30))
    plain, _ = moderated_t(y, _design(arm, np.full(6, "", dtype=object)), 1)
    adjusted, _ = moderated_t(y, _design(arm, crossed), 1)
    assert (adjusted > 10).all() and (plain < 3).all()
