"""Whole runs of the judge, each with a panel of its own: out comes what the one who answers goes by, and no more.

A run draws its panel, asks, reads, keeps and counts as any other; only the one who answers is ours. In 200 runs it is
in this process, in two it is a server.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from judge_server import JudgeServer
from judge_world import PLACED, Client, answer_noisily, make_spec, read_names, toss_coins, write_named_world

from perturbed.pathways.judge import judge_pathways
from perturbed.pathways.judge_statistics import POOLED

N_RUNS = 200
PLANTED = 6.0
"""Odds that a pathway of the gradients' lists has a relevant name, over those of any other."""


def judge_once(folder: Path, judge, seed: int, url: str | None = None) -> pd.DataFrame:
    """`odds.csv` of a run in a world of its own, by list."""
    enrichment, libraries = write_named_world(folder, PLANTED, seed)
    provider = None if url else Client(answer_noisily(judge))
    spec = make_spec(n_votes=3, seed=seed, base_url=url, concurrency=4 if url else 1)
    judge_pathways(enrichment, libraries, spec, folder / "out", cache=folder / "answers.jsonl", provider=provider)
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 3 * len(pd.read_csv(folder / "out/verdicts.csv"))
    return pd.read_csv(folder / "out/odds.csv").set_index("list")


def coverage(rows: pd.DataFrame, true: float) -> float:
    return float(((rows["low"] <= true) & (rows["high"] >= true)).mean())


def rows_of(runs: list[pd.DataFrame], name: str) -> pd.DataFrame:
    return pd.DataFrame([run.loc[name] for run in runs])


@pytest.fixture(scope="module")
def no_sync():
    """Two hundred thousand answers need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def test_a_judge_blind_to_the_list_is_covered_and_rarely_significant(tmp_path, no_sync):
    runs = [judge_once(tmp_path / str(seed), toss_coins(seed), seed) for seed in range(N_RUNS)]
    for name in (POOLED, *PLACED):
        rows = rows_of(runs, name)
        assert 0.93 <= coverage(rows, 1) <= 0.99, name
        assert (rows["p"] < 0.05).mean() <= 0.07, name
    assert np.mean([(run["p_holm"] < 0.05).any() for run in runs]) <= 0.07  # over the lists of a run, adjusted


def test_a_preference_for_what_names_say_is_recovered(tmp_path, no_sync):
    runs = [judge_once(tmp_path / str(seed), read_names, seed) for seed in range(N_RUNS)]
    pooled = rows_of(runs, POOLED)
    assert 0.93 <= coverage(pooled, PLANTED) <= 0.99
    assert np.median(pooled["odds_ratio"]) == pytest.approx(PLANTED, rel=0.2)
    assert (pooled["p"] < 0.05).mean() > 0.8
    for name in PLACED:  # rival and control have names like any others, and do not dilute what is pooled
        true = PLANTED if name.startswith("gradient_") else 1
        assert 0.93 <= coverage(rows_of(runs, name), true) <= 0.99, name


def test_both_judges_behind_a_server_are_the_same_as_here(tmp_path):
    found = {}
    for name, judge in (("blind", toss_coins(0)), ("preferring", read_names)):
        with JudgeServer(answer_noisily(judge)) as server:
            run = judge_once(tmp_path / name, judge, 0, server.url)
        pd.testing.assert_frame_equal(run, judge_once(tmp_path / f"{name}_here", judge, 0))
        found[name] = run.loc[POOLED]
    assert found["blind"]["low"] < 1 < found["blind"]["high"]
    assert 1 < found["preferring"]["low"] < PLANTED < found["preferring"]["high"]
