"""The judge's statistics against slow definitions."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from scipy.stats.contingency import odds_ratio

from perturbed.evaluation.statistics import holm
from perturbed.pathways.judge_statistics import (
    POOLED,
    _agreement,
    compare_odds,
    decide,
    fleiss_kappa,
    tabulate_agreement,
    tabulate_odds,
)

TABLES = [(7, 3, 40, 60), (3, 7, 90, 10), (1, 9, 5, 95), (9, 1, 50, 50), (10, 0, 80, 20), (0, 10, 30, 70), (5, 5, 6, 4)]


# --- slow references --------------------------------------------------------------------------------------------------


def probabilities(a: int, b: int, c: int, d: int, psi: Fraction) -> dict[int, Fraction]:
    """P(K = k) given the margins, exactly."""
    total = a + c
    weight = {
        k: comb(a + b, k) * comb(c + d, total - k) * psi**k for k in range(max(0, total - c - d), min(a + b, total) + 1)
    }
    everything = sum(weight.values())
    return {k: value / everything for k, value in weight.items()}


def fisher_by_enumeration(a: int, b: int, c: int, d: int) -> float:
    found = probabilities(a, b, c, d, Fraction(1))
    return float(sum(value for value in found.values() if value <= found[a]))


def interval_by_inversion(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """The ψ that a two-sided mid-p test at 5 % does not reject, on a fine grid."""
    kept = []
    for log in np.arange(-6, 6.0001, 0.02):
        found = probabilities(a, b, c, d, Fraction(float(np.exp(log))).limit_denominator(10**4))
        above = sum(value for k, value in found.items() if k > a) + found[a] / 2
        below = sum(value for k, value in found.items() if k < a) + found[a] / 2
        if min(above, below) >= Fraction(1, 40):
            kept.append(log)
    return kept[0], kept[-1]


def kappa_by_hand(votes: list[list[str]]) -> float:
    """Fleiss 1971, written out with a loop over pairs of votes."""
    agreeing, all_votes = [], [vote for row in votes for vote in row]
    for row in votes:
        pairs = [(i, j) for i in range(len(row)) for j in range(len(row)) if i != j]
        agreeing.append(sum(row[i] == row[j] for i, j in pairs) / len(pairs))
    observed = sum(agreeing) / len(agreeing)
    expected = sum((all_votes.count(word) / len(all_votes)) ** 2 for word in ("yes", "no"))
    return (observed - expected) / (1 - expected)


@pytest.mark.parametrize("table", TABLES)
def test_odds_ratio_is_that_of_slow_definitions(table):
    found = compare_odds(*table)
    a, b, c, d = table
    assert found.p == pytest.approx(fisher_by_enumeration(*table), rel=1e-9)
    assert found.value == pytest.approx(odds_ratio([[a, b], [c, d]], kind="conditional").statistic, rel=1e-5)
    low, high = interval_by_inversion(*table)
    if found.low > 0:
        assert np.log(found.low) == pytest.approx(low, abs=0.025)
    else:
        assert a == 0 and low == pytest.approx(-6)
    if np.isfinite(found.high):
        assert np.log(found.high) == pytest.approx(high, abs=0.025)
    else:
        assert b == 0 and high == pytest.approx(6)
    assert (found.p_mid < 0.05) == (found.low > 1 or found.high < 1)


def test_a_table_turned_round_gives_the_reciprocal():
    found, turned = compare_odds(7, 3, 40, 60), compare_odds(40, 60, 7, 3)
    assert turned.value == pytest.approx(1 / found.value) and turned.low == pytest.approx(1 / found.high)
    assert turned.p == pytest.approx(found.p)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ((10, 0, 100, 0), "every pathway was judged yes"),
        ((0, 10, 0, 100), "every pathway was judged no"),
        ((0, 0, 5, 5), "no pathway with a verdict on one side"),
    ],
)
def test_tables_that_say_nothing_have_no_number(table, reason):
    found = compare_odds(*table)
    assert np.isnan([found.value, found.low, found.high, found.p]).all() and found.reason == reason


def test_coverage_is_exact_enough_whatever_the_share_of_yes():
    """All tables of 10 against 100 pathways, weighted by their binomial probabilities: no simulation noise."""
    n, m = 10, 100
    limits = np.array(
        [[(r.low, r.high) for c in range(m + 1) for r in [compare_odds(a, n - a, c, m - c)]] for a in range(n + 1)]
    )
    limits = np.where(np.isnan(limits), [0.0, np.inf], limits)
    for true in (1.0, 4.0):
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            odds = share / (1 - share) * true
            weight = binom.pmf(np.arange(n + 1), n, odds / (1 + odds))[:, None] * binom.pmf(np.arange(m + 1), m, share)
            covered = float((weight * ((limits[..., 0] <= true) & (true <= limits[..., 1]))).sum())
            assert 0.95 <= covered <= 0.99, (true, share)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_rivals_are_not_pooled_and_random_genes_are_a_control():
    names = [f"p{i:02d}" for i in range(40)]
    yes = [i < 8 or i % 2 == 0 for i in range(40)]
    verdicts = pd.DataFrame(
        {"library": "l", "pathway": names, "set_size": 10, "is_random": [i >= 20 for i in range(40)],
         "verdict": np.where(yes, "yes", "no")}
    )  # fmt: skip
    lists = {"gradient_unperturbed": (0, 6), "gradient_perturbed": (4, 10), "pseudobulk": (10, 16), "random": (14, 22)}
    members = [
        pd.DataFrame({"library": "l", "list": name, "group": "all", "pathway": names[first:last]})
        for name, (first, last) in lists.items()
    ]
    odds = tabulate_odds(verdicts, pd.concat(members)).set_index("list")
    assert list(odds.index) == [POOLED, *lists]
    assert odds["n"].tolist() == [10, 6, 6, 6, 8] and odds.loc[POOLED, "n_yes"] == 9
    assert odds["n_random"].tolist() == [20, 20, 20, 20, 18]  # two of the control's were drawn, and compared to others
    claims = list(lists)[:3]
    assert odds.loc[[POOLED, "random"], "p_holm"].isna().all()
    assert odds.loc[claims, "p_holm"].to_numpy() == pytest.approx(holm(odds.loc[claims, "p"].to_numpy()))
    only = tabulate_odds(verdicts, pd.concat(members[2:]))
    assert POOLED not in set(only["list"])  # no gradients, nothing to pool


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yes", "no", "n", "majority", "unanimous", "any_"),
    [
        (3, 0, 3, "yes", "yes", "yes"),
        (2, 1, 3, "yes", "no", "yes"),
        (1, 2, 3, "no", "no", "yes"),
        (0, 3, 3, "no", "no", "no"),
        (2, 0, 3, "yes", "undecided", "yes"),
        (1, 1, 3, "undecided", "no", "yes"),
        (0, 2, 3, "no", "no", "undecided"),
        (1, 0, 3, "undecided", "undecided", "yes"),
        (0, 0, 3, "undecided", "undecided", "undecided"),
        (2, 2, 4, "undecided", "no", "yes"),
    ],
)
def test_an_invalid_vote_is_no_no(yes, no, n, majority, unanimous, any_):
    assert [decide(yes, no, n, rule) for rule in ("majority", "unanimous", "any")] == [majority, unanimous, any_]


# --- agreement --------------------------------------------------------------------------------------------------------


def test_kappa_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    for n_votes in (2, 3, 5):
        yes = rng.binomial(n_votes, rng.random(30))
        votes = [["yes"] * int(k) + ["no"] * int(n_votes - k) for k in yes]
        assert fleiss_kappa(yes, n_votes) == pytest.approx(kappa_by_hand(votes))
    assert fleiss_kappa(np.array([3, 0, 3, 0]), 3) == pytest.approx(1)
    assert fleiss_kappa(np.array([1, 1]), 2) == pytest.approx(-1)
    assert np.isnan(fleiss_kappa(np.array([3, 3]), 3))


def panel(yes: np.ndarray, n_votes: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"library": "l", "is_random": np.arange(len(yes)) % 2 == 0, "votes_yes": yes, "votes_no": n_votes - yes,
         "verdict": "yes"}
    )  # fmt: skip


def test_the_interval_of_kappa_covers():
    covered = []
    n_votes, share, noise = 3, 0.5, 0.15
    right = (1 - noise) ** 2 + noise**2  # chance that two votes of a pathway agree; P_e is 1/2 by symmetry
    true = (right - 0.5) / 0.5
    for run in range(200):
        rng = np.random.default_rng([9, run])
        relevant = rng.random(120) < share
        yes = rng.binomial(n_votes, np.where(relevant, 1 - noise, noise))
        row = _agreement(yes, n_votes, run, judged=True)
        covered.append(row["kappa_low"] <= true <= row["kappa_high"])
    assert 0.91 <= np.mean(covered) <= 0.99


def test_agreement_says_why_there_is_none():
    every = tabulate_agreement(panel(np.full(8, 3), 3), 3, seed=0)
    assert every["kappa"].isna().all() and set(every["reason"]) == {"every vote is the same"}
    assert (every["share_unanimous"] == 1).all() and (every["share_low"] < 1).all()
    one = tabulate_agreement(panel(np.array([1, 0, 1, 0]), 1), 1, seed=0)
    assert set(one["reason"]) == {"one vote agrees with itself"}
    split = tabulate_agreement(panel(np.array([3, 0, 0, 3]), 3), 3, seed=0).iloc[0]
    assert split["kappa"] == 1 and np.isnan(split["kappa_low"]) and "nothing to resample" in split["reason"]
    missing = panel(np.array([3, 0, 1, 2]), 3)
    missing.loc[0, "votes_yes"] = 2  # a vote was invalid
    assert tabulate_agreement(missing, 3, seed=0).iloc[0][["n", "n_left_out"]].tolist() == [3, 1]
