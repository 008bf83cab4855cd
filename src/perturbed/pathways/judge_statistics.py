"""Statistics of the judge: verdicts from votes, odds ratios of lists against random pathways, agreement of votes.

Everything is conditional on the number of pathways judged relevant (the table's margins): under the null hypothesis
that answers know nothing of the list, the list's share of them is hypergeometric, whatever makes single pathways likely
or unlikely to be called relevant. `docs/judge.md` holds the measured coverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
from scipy import optimize, special

from perturbed.evaluation.statistics import holm, wilson
from perturbed.pathways.spec import CONTROL

POOLED = "gradient lists"
"""The row of all lists whose names begin with `gradient_`, taken together."""
VERDICTS = ("yes", "no", "undecided")
NOT_JUDGED = "not judged"
LEVEL = 0.95
N_BOOTSTRAP = 2000
_LIMIT = 60.0  # |log odds ratio| beyond which the root is at infinity


def decide(n_yes: int, n_no: int, n_votes: int, rule: Literal["majority", "unanimous", "any"]) -> str:
    """The verdict of one pathway: `yes`, `no`, or `undecided` where the votes without an answer could change it.

    Parameters
    ----------
    n_yes, n_no
        Votes with an answer.
    n_votes
        Votes asked for, invalid and refused ones among them.
    rule
        Votes that a `yes` needs: `majority` more than half, `unanimous` all, `any` one. A tie of an even number of
        votes is undecided.
    """
    if rule == "majority":
        return "yes" if 2 * n_yes > n_votes else "no" if 2 * n_no > n_votes else "undecided"
    if rule == "unanimous":
        return "yes" if n_yes == n_votes else "no" if n_no else "undecided"
    return "yes" if n_yes else "no" if n_no == n_votes else "undecided"


@dataclass(frozen=True)
class OddsRatio:
    """An odds ratio with its interval and tests; NaN where the table says nothing, with the reason."""

    value: float
    low: float
    high: float
    p: float
    """Fisher's exact test, two-sided: tables no likelier than this one."""
    p_mid: float
    """Twice the smaller mid-p tail: below 0.05 exactly where the 95 % interval leaves 1 out."""
    reason: str = ""


@lru_cache(maxsize=4096)
def compare_odds(yes: int, no: int, other_yes: int, other_no: int, level: float = LEVEL) -> OddsRatio:
    """Odds of `yes` in one set of pathways over those in another, by the conditional likelihood.

    Given all margins the first cell K has Fisher's noncentral hypergeometric distribution,
    `P(K = k; ψ) ∝ C(n, k) C(m, t − k) ψ^k`, with n and m the sizes of the sets and t the number of `yes`. The estimate
    maximises it (E[K; ψ] = yes); the limits solve `P(K > yes; ψ) + P(K = yes; ψ) / 2 = α/2` and its mirror image
    (mid-p: without the halving, Cornfield's exact interval covers far more than 95 % in tables as small as these). The
    estimate is 0 or infinite where a cell forces it to be, with one limit still finite.

    Parameters
    ----------
    yes, no
        Pathways of the first set.
    other_yes, other_no
        Pathways of the second.
    level
        Coverage of the interval.

    Notes
    -----
    Cornfield 1956; mid-p: Lancaster 1961, Berry & Armitage 1995 (10.2307/2348891); R's `fisher.test` gives the same
    estimate and p.
    """
    counts = np.array([yes, no, other_yes, other_no])
    if (counts < 0).any():
        raise ValueError(f"counts cannot be negative: {counts.tolist()}")
    n, m, total = yes + no, other_yes + other_no, yes + other_yes
    support = np.arange(max(0, total - m), min(n, total) + 1)
    if n == 0 or m == 0:
        return _undefined("no pathway with a verdict on one side")
    if len(support) == 1:
        return _undefined(f"every pathway was judged {'no' if total == 0 else 'yes'}")
    log_weight = _log_choose(n, support) + _log_choose(m, total - support)
    null = _pmf(log_weight, support, 0.0)
    at = int(yes - support[0])
    tail = (1 - level) / 2
    mean = _solve(lambda t: float(_pmf(log_weight, support, t) @ support) - yes, at, len(support))
    low = -np.inf if at == 0 else _root(lambda t: _mid_tail(_pmf(log_weight, support, t), at, above=True) - tail)
    high = (
        np.inf
        if at == len(support) - 1
        else _root(lambda t: tail - _mid_tail(_pmf(log_weight, support, t), at, above=False))
    )
    p = float(null[null <= null[at] * (1 + 1e-7)].sum())
    mid = 2 * min(_mid_tail(null, at, above=True), _mid_tail(null, at, above=False))
    value, lower, upper = (float(np.exp(x)) for x in (mean, low, high))
    return OddsRatio(value, lower, upper, min(1.0, p), min(1.0, mid))


def _undefined(reason: str) -> OddsRatio:
    return OddsRatio(np.nan, np.nan, np.nan, np.nan, np.nan, reason)


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _pmf(log_weight: np.ndarray, support: np.ndarray, log_odds: float) -> np.ndarray:
    log = log_weight + support * log_odds
    weight = np.exp(log - log.max())
    return weight / weight.sum()


def _mid_tail(pmf: np.ndarray, at: int, *, above: bool) -> float:
    return float((pmf[at + 1 :] if above else pmf[:at]).sum() + pmf[at] / 2)


def _solve(function, at: int, n: int) -> float:  # type: ignore[no-untyped-def]
    return -np.inf if at == 0 else np.inf if at == n - 1 else _root(function)


def _root(function) -> float:  # type: ignore[no-untyped-def]
    """Zero of an increasing function of the log odds ratio."""
    return float(optimize.brentq(function, -_LIMIT, _LIMIT, xtol=1e-10))


# --- tables -----------------------------------------------------------------------------------------------------------


def tabulate_odds(verdicts: pd.DataFrame, memberships: pd.DataFrame) -> pd.DataFrame:
    """Each list, and the gradients' lists together, against the random pathways of the same library.

    The rivals' lists and the one of random genes stay out of what is taken together, which is about gradients. Random
    genes are the negative control: their row is no claim, so it takes no share of Holm's error.

    Parameters
    ----------
    verdicts
        `library, pathway, set_size, is_random, verdict`: one row per pathway, so that one in several lists counts once
        where lists are taken together.
    memberships
        `library, list, group, pathway`, of the listed pathways.

    Returns
    -------
    table
        `library, list, group`, counts of verdicts here and among the random, `odds_ratio, low, high` (95 %), `p`
        (Fisher), `p_mid`, `p_holm` (Fisher's over the lists of a library but the control; lists taken together stand
        apart), median set sizes of both, `reason` where undefined. Lists share pathways, so their rows are not
        independent.
    """
    rows = []
    for library, found in verdicts.groupby("library", sort=True):
        of_library = memberships[memberships["library"] == library]
        gradients = of_library[of_library["list"].str.startswith("gradient_")]
        if len(gradients):
            rows.append(_compare(str(library), POOLED, "", found, set(gradients["pathway"])))
        for (name, group), members in of_library.groupby(["list", "group"], sort=False):
            rows.append(_compare(str(library), str(name), str(group), found, set(members["pathway"])))
    table = pd.DataFrame(rows)
    for _, part in table[~table["list"].isin([POOLED, CONTROL])].groupby("library"):
        table.loc[part.index, "p_holm"] = holm(part["p"].to_numpy(float))
    return table


def _compare(library: str, name: str, group: str, found: pd.DataFrame, members: set[str]) -> dict[str, object]:
    """Members against the random pathways that are none of them: a pathway of the control may have been drawn, too."""
    own = found["pathway"].isin(members)
    listed, random = found[own], found[found["is_random"] & ~own]
    here, there = (part["verdict"].value_counts() for part in (listed, random))
    judged = (listed["verdict"] != NOT_JUDGED).any()
    counts = [int(side.get(verdict, 0)) for side in (here, there) for verdict in ("yes", "no")]
    odds = compare_odds(*counts) if judged else _undefined(NOT_JUDGED)
    return {
        "library": library, "list": name, "group": group, "n": len(listed),
        **{f"n_{verdict}": int(here.get(verdict, 0)) for verdict in VERDICTS},
        "n_random": len(random),
        **{f"n_random_{verdict}": int(there.get(verdict, 0)) for verdict in VERDICTS},
        "odds_ratio": odds.value, "low": odds.low, "high": odds.high, "p": odds.p, "p_mid": odds.p_mid,
        "p_holm": np.nan,
        "median_size": listed["set_size"].median(), "median_size_random": random["set_size"].median(),
        "reason": odds.reason,
    }  # fmt: skip


# --- agreement --------------------------------------------------------------------------------------------------------


def fleiss_kappa(yes: np.ndarray, n_votes: int) -> float:
    """Fleiss' κ of two categories; NaN where all votes are alike or there is only one a pathway.

    `κ = (P̄ − P_e) / (1 − P_e)`, P̄ the mean share of agreeing pairs of votes of a pathway,
    `P_e = q² + (1 − q)²` with q the share of `yes` among all votes (Fleiss 1971, 10.1037/h0031619).

    Parameters
    ----------
    yes
        Votes `yes` (..., n_pathways); leading axes are separate draws.
    n_votes
        Votes of each pathway, the same for all.
    """
    return float(_kappas(np.atleast_2d(yes), n_votes)[0])


def _kappas(yes: np.ndarray, n_votes: int) -> np.ndarray:
    """κ per row (n_draws, n_pathways) -> (n_draws,)."""
    if n_votes < 2 or yes.shape[1] == 0:
        return np.full(len(yes), np.nan)
    no = n_votes - yes
    agreeing = ((yes * (yes - 1) + no * (no - 1)) / (n_votes * (n_votes - 1))).mean(axis=1)
    share = yes.mean(axis=1) / n_votes
    chance = share**2 + (1 - share) ** 2
    same = chance > 1 - 1e-12
    return np.where(same, np.nan, (agreeing - chance) / np.where(same, 1.0, 1 - chance))


def tabulate_agreement(verdicts: pd.DataFrame, n_votes: int, seed: int) -> pd.DataFrame:
    """Agreement of the votes: Fleiss' κ with a bootstrap interval over pathways, and the share of unanimous pathways.

    Parameters
    ----------
    verdicts
        `library, is_random, votes_yes, votes_no, verdict`.
    n_votes
        Votes asked for; pathways with fewer answers are counted in `n_left_out`.
    seed
        Of the bootstrap.

    Returns
    -------
    table
        One row for all pathways, the listed and the random ones, each of every library and together.
    """
    libraries = sorted(verdicts["library"].unique())
    rows = []
    for library in [*(["all"] if len(libraries) > 1 else []), *libraries]:
        inside = verdicts if library == "all" else verdicts[verdicts["library"] == library]
        for name, part in _kinds(inside):
            complete = part[part["votes_yes"] + part["votes_no"] == n_votes]
            yes = complete["votes_yes"].to_numpy(int)
            judged = (part["verdict"] != NOT_JUDGED).any()
            rows.append(
                {"library": library, "pathways": name, "n": len(yes), "n_left_out": len(part) - len(yes),
                 "n_votes": n_votes, **_agreement(yes, n_votes, seed, judged=bool(judged))}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _kinds(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", table
    yield "listed", table[~table["is_random"]]
    yield "random", table[table["is_random"]]


def _agreement(yes: np.ndarray, n_votes: int, seed: int, *, judged: bool) -> dict[str, object]:
    kappa = fleiss_kappa(yes, n_votes)
    low, high, reason = np.nan, np.nan, ""
    if not judged:
        reason = NOT_JUDGED
    elif n_votes < 2:
        reason = "one vote agrees with itself"
    elif not len(yes):
        reason = "no pathway with an answer in every vote"
    elif np.isnan(kappa):
        reason = "every vote is the same"
    elif kappa == 1:
        reason = "all votes agree, which leaves nothing to resample; see the interval of the share"
    else:
        picks = np.random.default_rng([seed, len(yes)]).integers(len(yes), size=(N_BOOTSTRAP, len(yes)))
        low, high = np.nanquantile(_kappas(yes[picks], n_votes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    unanimous = int(np.isin(yes, (0, n_votes)).sum())
    share = unanimous / len(yes) if len(yes) else np.nan
    limits = wilson(share, len(yes))
    return {
        "kappa": kappa, "kappa_low": low, "kappa_high": high, "share_unanimous": share, "share_low": limits[0],
        "share_high": limits[1], "share_yes": yes.mean() / n_votes if len(yes) else np.nan, "reason": reason,
    }  # fmt: skip
