"""The bootstrap, contrasts, Holm, win rates, strata and normalised scores, each against a slow reference."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbed.config import StatisticsSpec
from perturbed.data.contracts import SCORE_COLUMNS
from perturbed.errors import DataError
from perturbed.evaluation.bootstrap import (
    cluster_standard_error,
    draw_seed_shifts,
    estimate_mean,
    estimate_ratio,
    number_genes,
    plan_draws,
)
from perturbed.evaluation.statistics import (
    arrange,
    choose_floor,
    contrast,
    direction_of,
    effective_number,
    holm,
    normalise,
    orient,
    stratify,
    wilson,
)
from perturbed.names import genes_of

SPEC = StatisticsSpec(n_bootstrap=400)


def make_scores(values: dict[tuple[str, str], dict[str, float | list[float]]], **constant) -> pd.DataFrame:
    """A table from {(method, metric): {perturbation: score or scores per seed}}."""
    rows = []
    for (method, metric), by_perturbation in values.items():
        for perturbation, scores in by_perturbation.items():
            for seed, value in enumerate(scores if isinstance(scores, list) else [scores]):
                row = dict(zip(SCORE_COLUMNS, ("d", "s", 0, method, seed, "all", perturbation, "combo_seen2", 40, 1.0)))
                rows.append({**row, "metric": metric, "value": value, "reason": "none" if np.isnan(value) else ""})
    return pd.DataFrame(rows).assign(**constant)


def hub_doubles(n_hubs: int, n_partners: int) -> list[str]:
    """Doubles that share genes: every hub with every partner."""
    return [f"H{i}+P{j:02d}" for i, j in itertools.product(range(n_hubs), range(n_partners))]


# --- bootstrap ----------------------------------------------------------------------------------------------------


def test_weight_of_a_perturbation_is_the_product_of_its_genes_weights():
    names = ["A", "A+B", "B+C", "C"]
    plan = plan_draws(names, 50, (3, 7))
    genes = ["A", "B", "C"]
    gene_weights = np.random.default_rng([3, 7]).exponential(size=(50, 3))
    for b, p in itertools.product(range(50), range(4)):
        expected = 1.0
        for gene in genes_of(names[p]):
            expected *= gene_weights[b, genes.index(gene)]
        assert plan.weights[b, p] == pytest.approx(expected)
    shared = [[float(bool(set(genes_of(p)) & set(genes_of(q)))) for q in names] for p in names]
    np.testing.assert_array_equal(plan.shared.toarray(), shared)
    assert plan.count_genes(np.array([True, True, False, False])) == 2


def test_genes_are_numbered_in_sorted_order_whatever_the_order_of_names():
    np.testing.assert_array_equal(number_genes(["B+C", "A"]), [[1, 2], [0, -1]])


def test_cluster_standard_error_is_the_double_sum_over_pairs_that_share_a_gene():
    names = ["A+B", "B+C", "C+D", "E"]
    plan = plan_draws(names, 1, (0,))
    e = np.array([0.5, 0.4, -0.2, -0.7])
    total = sum(e[p] * e[q] for p in range(4) for q in range(4) if set(genes_of(names[p])) & set(genes_of(names[q])))
    independent = sum(e**2) / (4 * 3)
    expected = np.sqrt(max(total / 16 * 5 / 4, independent))
    assert cluster_standard_error(e, plan.shared, 4, 5) == pytest.approx(expected)
    assert total / 16 * 5 / 4 > independent  # the clustered branch is the one tested


def test_singles_have_the_standard_error_of_independent_data():
    names = [f"G{i:02d}" for i in range(30)]
    values = np.random.default_rng(0).normal(size=(30, 1))
    found = estimate_mean(plan_draws(names, 4000, (1,)), values)
    assert found.value == pytest.approx(values.mean())
    assert found.se == pytest.approx(values.std(ddof=1) / np.sqrt(30), rel=0.01)
    t = stats.ttest_1samp(values[:, 0], 0.0)
    assert found.p == pytest.approx(t.pvalue, abs=0.05)
    assert found.low == pytest.approx(t.confidence_interval().low, abs=0.1)


def test_draws_of_the_estimate_agree_with_a_loop():
    """Interval and p of a paired difference with seeds, recomputed draw by draw."""
    names = ["A+B", "B+C", "C+D", "A+D", "E+F", "F+G"]
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(6, 3)), rng.normal(size=(6, 1))
    plan = plan_draws(names, 200, (9,))
    found = estimate_mean(plan, first, second, names=("m", "b"), confidence=0.9)
    from perturbed.evaluation.bootstrap import name_key

    shifts = draw_seed_shifts(3, 200, (9, *name_key("seeds", "m")))
    difference = first.mean(axis=1) - second[:, 0]
    value, plain, seed_part = difference.mean(), [], []
    for b in range(200):
        w = plan.weights[b]
        plain.append(sum(w[p] * difference[p] for p in range(6)) / sum(w))
        seed_part.append(sum(w[p] * first[p, s] * shifts[b, s] for p in range(6) for s in range(3)) / sum(w))
    scale = cluster_standard_error(difference - value, plan.shared, 6, 7) / np.std(plain)
    shift = scale * (np.array(plain) - value) + seed_part
    stretch = stats.t.ppf(0.95, 5) / stats.norm.ppf(0.95)
    low, high = value + stretch * np.quantile(shift, [0.05, 0.95])
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    assert found.se == pytest.approx(np.std(shift))
    beyond = min((value + stretch * shift <= 0).sum(), (value + stretch * shift >= 0).sum())
    assert beyond >= 10
    assert found.p == pytest.approx(2 * (beyond + 1) / 201)


def test_seed_shifts_have_the_variance_of_a_mean_of_seeds():
    shifts = draw_seed_shifts(3, 200_000, (1,))
    np.testing.assert_allclose(shifts.sum(axis=1), 0, atol=1e-12)
    x = np.array([1.0, 4.0, 5.5])
    assert (shifts @ x).var() == pytest.approx(x.var(ddof=1) / 3, rel=0.02)
    assert (draw_seed_shifts(1, 10, (1,)) == 0).all()


def test_seeds_widen_the_interval_and_a_single_seed_is_broadcast():
    names = [f"G{i:02d}" for i in range(40)]
    base = np.random.default_rng(0).normal(size=(40, 1))
    plan = plan_draws(names, 1000, (1,))
    same = estimate_mean(plan, np.repeat(base, 3, axis=1), base * 0)
    spread = estimate_mean(plan, base + np.array([[-0.5, 0.0, 0.5]]), base * 0)
    assert same.value == pytest.approx(spread.value)
    assert spread.se**2 == pytest.approx(same.se**2 + 0.25 / 3, rel=0.1)


def test_ratio_of_means_by_hand_and_its_interval_covers():
    plan = plan_draws(["A", "B", "C"], 100, (0,))
    column = lambda *x: np.array(x, dtype=float)[:, None]  # noqa: E731
    found = estimate_ratio(plan, column(3, 5, 7), column(1, 1, 1), column(5, 9, 7))
    assert found.value == pytest.approx((5 - 1) / (7 - 1))
    assert found.low < found.value < found.high


def test_nothing_is_said_of_one_perturbation_or_of_none():
    plan = plan_draws(["A", "B"], 100, (0,))
    one = estimate_mean(plan, np.array([[1.0], [np.nan]]))
    assert one.value == 1.0 and one.n == 1 and np.isnan([one.low, one.high, one.p]).all()
    none = estimate_mean(plan, np.full((2, 1), np.nan))
    assert none.n == 0 and np.isnan(none.value)


def test_identical_methods_differ_by_nothing():
    plan = plan_draws(hub_doubles(3, 4), 200, (0,))
    values = np.random.default_rng(0).normal(size=(12, 1))
    found = estimate_mean(plan, values, values)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def simulate_coverage(names: list[str], gene_share: float, n_sets: int = 250) -> tuple[float, float]:
    """Coverage of 0 by the 95 % interval under no difference: ours, and the bootstrap of perturbations."""
    members = number_genes(names)
    plan = plan_draws(names, 400, (4,))
    rng = np.random.default_rng(11)
    naive_weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=400)
    ours = naive = 0
    for _ in range(n_sets):
        effects = rng.normal(size=members.max() + 1) * np.sqrt(gene_share / 2)
        difference = effects[members].sum(axis=1) + rng.normal(size=len(names)) * np.sqrt(1 - gene_share)
        found = estimate_mean(plan, difference[:, None])
        ours += found.low <= 0 <= found.high
        low, high = np.quantile(naive_weights @ difference / len(names), [0.025, 0.975])
        naive += low <= 0 <= high
    return ours / n_sets, naive / n_sets


def irregular_doubles(n: int, n_genes: int) -> list[str]:
    """Doubles of genes of very unequal popularity, as in screens of combinations."""
    rng = np.random.default_rng(2)
    weight = rng.pareto(2.5, n_genes) + 0.3
    found: set[str] = set()
    while len(found) < n:
        i, j = sorted(rng.choice(n_genes, 2, replace=False, p=weight / weight.sum()))
        found.add(f"G{i:03d}+G{j:03d}")
    return sorted(found)


def test_null_intervals_cover_0_and_the_naive_bootstrap_does_not_where_genes_matter():
    doubles = irregular_doubles(131, 105)
    ours, naive = simulate_coverage(doubles, gene_share=0.8)
    assert 0.90 <= ours <= 0.99
    assert naive < 0.80
    ours, naive = simulate_coverage(doubles, gene_share=0.0)
    assert 0.90 <= ours <= 0.99
    assert naive > 0.88  # without gene effects perturbations are independent, and there is nothing to correct


def test_null_p_values_are_about_uniform():
    names = irregular_doubles(60, 50)
    plan = plan_draws(names, 400, (4,))
    rng = np.random.default_rng(3)
    p = [estimate_mean(plan, rng.normal(size=(60, 1))).p for _ in range(300)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert 0.40 <= np.mean(np.array(p) < 0.5) <= 0.60


def test_a_planted_difference_is_found_and_p_is_not_stuck_at_the_number_of_draws():
    names = hub_doubles(5, 8)
    rng = np.random.default_rng(0)
    found = estimate_mean(plan_draws(names, 200, (1,)), 2 + 0.3 * rng.normal(size=(40, 1)))
    assert found.low > 1.5
    assert found.p < 1e-6


# --- arranging and contrasts --------------------------------------------------------------------------------------


def test_rows_are_averaged_within_perturbations_over_those_that_both_define():
    nan = np.nan
    scores = pd.concat(
        [
            make_scores({("m", "r"): {"A": 1.0, "B": 2.0}, ("b", "r"): {"A": 0.0, "B": 0.0}}, context="c1"),
            make_scores({("m", "r"): {"A": 5.0, "B": nan}, ("b", "r"): {"A": 1.0, "B": 9.0}}, context="c2"),
        ]
    )
    (grid,) = arrange(scores, SPEC)
    first, second = grid.average("r", ("m", "b"))
    np.testing.assert_array_equal(first[:, 0], [3.0, 2.0])  # B of c2 is out for both
    np.testing.assert_array_equal(second[:, 0], [0.5, 0.0])
    assert contrast(grid, "m", "b", "r", 1).difference.value == pytest.approx((2.5 + 2.0) / 2)


def test_a_row_needs_every_seed():
    scores = make_scores({("m", "r"): {"A": [1.0, np.nan], "B": [1.0, 2.0]}, ("b", "r"): {"A": 0.0, "B": 0.0}})
    (grid,) = arrange(scores, SPEC)
    found = contrast(grid, "m", "b", "r", 1)
    assert (found.difference.n, found.n_left_out, found.n_seeds, found.n_seeds_baseline) == (1, 1, 2, 1)
    assert found.difference.value == 1.5


@pytest.mark.parametrize(("direction", "expected"), [(1, 0.5), (-1, -0.5), (0, -0.5)])
def test_positive_difference_means_the_method_is_better(direction, expected):
    names = {"A": 2.0, "B": 2.0, "C": 2.0}
    scores = make_scores({("m", "r"): names, ("b", "r"): dict.fromkeys(names, 1.5)})
    (grid,) = arrange(scores, SPEC)
    found = contrast(grid, "m", "b", "r", direction)
    assert found.difference.value == pytest.approx(expected)
    assert (found.method_mean, found.baseline_mean) == (2.0, 1.5)
    assert found.win_rate == (expected > 0)


def test_orient():
    np.testing.assert_allclose(orient(np.array([0.8, 1.5]), 0), [-0.2, -0.5])
    np.testing.assert_allclose(orient(np.array([2.0]), -1), [-2.0])


def test_win_rate_counts_ties_half_and_wilson_has_textbook_values():
    scores = make_scores({("m", "r"): {"A": 2.0, "B": 1.0, "C": 0.0}, ("b", "r"): {"A": 1.0, "B": 1.0, "C": 1.0}})
    (grid,) = arrange(scores, SPEC)
    assert contrast(grid, "m", "b", "r", 1).win_rate == pytest.approx(0.5)
    from statsmodels.stats.proportion import proportion_confint

    for k, n in ((0, 10), (7, 10), (38, 38)):
        assert wilson(k / n, n) == pytest.approx(proportion_confint(k, n, method="wilson"))
    assert np.isnan(wilson(np.nan, 0)).all()


def test_effective_number_of_perturbations():
    everywhere = np.ones(3, dtype=bool)
    assert effective_number(plan_draws(["A", "B", "C"], 1, (0,)), everywhere) == pytest.approx(3)
    names = ["A+B", "B+C", "D"]
    overlap = sum(
        len(set(genes_of(p)) & set(genes_of(q))) / np.sqrt(len(genes_of(p)) * len(genes_of(q)))
        for p in names
        for q in names
    )
    assert effective_number(plan_draws(names, 1, (0,)), everywhere) == pytest.approx(9 / overlap)


def test_holm_agrees_with_statsmodels_and_ignores_nan():
    from statsmodels.stats.multitest import multipletests

    p = np.array([0.001, 0.04, 0.03, 0.2, 0.01, 0.01])
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    with_nan = np.insert(p, 2, np.nan)
    np.testing.assert_allclose(np.delete(holm(with_nan), 2), holm(p))
    assert np.isnan(holm(with_nan)[2])
    assert holm(np.array([])).size == 0


def test_unknown_direction_is_refused():
    with pytest.raises(DataError, match="direction of metric 'new' is unknown"):
        direction_of("new", {"r": 1})


def test_same_seed_same_interval_and_another_seed_another():
    names = dict(zip(hub_doubles(3, 4), np.random.default_rng(0).normal(size=12)))
    scores = make_scores({("m", "r"): names, ("b", "r"): dict.fromkeys(names, 0.0)})
    lows = []
    for seed in (0, 0, 1):
        (grid,) = arrange(scores, StatisticsSpec(n_bootstrap=200, seed=seed))
        lows.append(contrast(grid, "m", "b", "r", 1).difference.low)
    assert lows[0] == lows[1] != lows[2]


# --- floors, ceilings, strata -------------------------------------------------------------------------------------

DOUBLES = hub_doubles(4, 5)


def levels(**mean: float) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    noise = {name: rng.normal(0, 0.01) for name in DOUBLES}
    return make_scores({(m, "r"): {p: value + noise[p] for p in DOUBLES} for m, value in mean.items()})


def test_normalised_score_by_hand_is_not_clipped():
    values = levels(mean_effect=0.2, no_change=0.0, good=0.5, better=0.9, worse=0.1, technical_duplicate=0.8, truth=1.0)
    (grid,) = arrange(values, SPEC)
    for method, expected in (("good", 0.5), ("better", 7 / 6), ("worse", -1 / 6), ("mean_effect", 0.0)):
        assert normalise(grid, method, "r", 1).ratio.value == pytest.approx(expected)
    assert normalise(grid, "good", "r", 1, ceiling="truth").ratio.value == pytest.approx(0.3 / 0.8)


def test_floor_falls_back_to_no_change_where_mean_effect_is_undefined():
    (grid,) = arrange(levels(mean_effect=np.nan, no_change=0.0, good=0.4, technical_duplicate=0.8), SPEC)
    assert choose_floor(grid, "r") == "no_change"
    assert normalise(grid, "good", "r", 1).ratio.value == pytest.approx(0.5)
    assert "truth was not scored" in normalise(grid, "good", "r", 1, ceiling="truth").note
    (grid,) = arrange(levels(good=0.4), SPEC)
    assert normalise(grid, "good", "r", 1).note == "no floor is defined"


def test_normalised_score_is_left_out_where_the_ceiling_is_not_clear_of_the_floor():
    values = levels(mean_effect=0.5, good=0.6, technical_duplicate=0.5)
    values["value"] += np.random.default_rng(0).normal(0, 0.2, len(values))
    (grid,) = arrange(values, SPEC)
    found = normalise(grid, "good", "r", 1)
    assert found.ratio is None
    assert "is not clear of 0" in found.note
    (grid,) = arrange(levels(mean_effect=0.9, good=0.6, technical_duplicate=0.5), SPEC)
    assert normalise(grid, "good", "r", 1).ratio is None  # a ceiling below the floor


def test_strata_are_equal_parts_by_rank_of_effect_size():
    scores = make_scores({("m", "r"): {f"G{i}": 0.0 for i in range(9)}})
    scores["effect_size"] = [5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]
    (grid,) = arrange(scores, SPEC)
    strata = {
        name: sorted(grid.rows.loc[keep, "effect_size"]) for kind, name, keep in stratify(grid, 3) if kind != "subgroup"
    }
    assert strata == {"1": [1, 2, 3], "2": [4, 5, 6], "3": [7, 8, 9]}
    subgroups = [name for kind, name, _ in stratify(grid, 3) if kind == "subgroup"]
    assert subgroups == ["combo_seen2"]
