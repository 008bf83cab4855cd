"""The winner's targets on real cells: 38 doubles of Norman 2019 that training never saw."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "../shared/data/norman2019_combo1000.h5ad"


@pytest.mark.skipif(not CELLS.is_file(), reason=f"{CELLS.name} is not in ../shared/data")
def test_the_winner_meets_its_targets_zero_shot(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ladder

    names = ("additive", "shrunk_saturating", "shrunk_interaction")
    scores = ladder.norman(tmp_path).score(
        ladder.zero_shot(), "zero_shot", {name: ladder.RUNGS[name] for name in names}
    )
    assert scores["perturbation"].nunique() == 38
    found = scores.groupby(["metric", "method"])["value"].mean()
    winner = {metric: found[metric]["shrunk_interaction"] for metric in ladder.METRICS}
    assert winner["l2_delta"] <= 3.30
    assert winner["pearson_delta_pert"] >= 0.70
    assert winner["pearson_delta_ctrl"] >= 0.84
    for metric, direction in ladder.METRICS.items():
        for other in names[:2]:
            assert direction * winner[metric] > direction * found[metric][other]
