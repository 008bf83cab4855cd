"""Gradient cases in the real Snakemake."""

from __future__ import annotations

import pytest
from pipeline import Run

pytestmark = pytest.mark.workflow

SCREEN = {
    "dataset": "tiny", "split": "zero_shot", "method": "nb_vae", "screen": True, "unperturbed": {"values": ["control"]},
}  # fmt: skip
FLOW = {
    **SCREEN, "screen": False, "moves": [{"targets": ["perturbed"]}], "perturbed": {"values": ["G00"]},
    "method": "headed", "groups": "batch", "masked_groups": True, "judged": ["batch0", "batch1"], "seeds": 1,
    "answers": ["paper_b_irf8_flow"],
}  # fmt: skip


@pytest.fixture
def run(new_run: Run) -> Run:
    heads = {"perturbed": {"column": "perturbation", "positive": ["G00"]}}
    new_run.configure(
        gradients={"screen": SCREEN, "flow": FLOW},
        variants={"headed": {"method": "nb_vae", "params": {"heads": heads}}},
        methods=["no_change", "mean_effect"],
        studies={},
        method_seeds={},
        method_params={},
        statistics={"primary_method": "mean_effect", "primary_baseline": "no_change", "baselines": ["no_change"]},
    )
    return new_run


def test_cases_plan_their_own_fits_and_figures(run):
    jobs = run.planned("--", "gradients")
    assert jobs["fit"] == 4 and jobs["flow"] == 4, "two seeds of the screen, one of each masked group"
    assert jobs["gather_flows"] == 2 and jobs["draw_case_screen"] == jobs["draw_case_flow"] == 1
    assert jobs["draw_quality"] == 1 and "evaluate" not in jobs and "summarise" not in jobs
    one = run.planned("--", "paper_b_irf8_flow")
    assert one["fit"] == 2 and "draw_case_screen" not in one


def test_an_item_that_is_not_answered_says_which_config_does(run):
    shown = run.snakemake("paper_b_cardiotoxin", check=False)
    assert "nothing in this config answers paper_b_cardiotoxin" in shown and "paper_b.yaml" in shown
