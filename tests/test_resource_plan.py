"""What jobs ask for, attempt by attempt."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from perturbed.plan import Plan
from perturbed.resource_plan import GRES, ResourcePlan, grow, read_gres

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def of(method: str) -> SimpleNamespace:
    return SimpleNamespace(dataset="simulation", split="zero_shot", fold="0", method=method, seed="0")


def resources(**config) -> ResourcePlan:
    return Plan({"dataset": "simulation", "methods": ["additive", "perturbedvae", "elastic_net"], **config}).resources


def by_attempt(ask, *wildcards):
    return [ask(*wildcards, attempt) for attempt in (1, 2, 3)]


def test_a_cluster_without_gpus_is_asked_once_and_one_with_them_always():
    found = {device: by_attempt(resources(device=device).fit_gpu, of("perturbedvae")) for device in ("auto", "cuda")}
    assert found == {"auto": [1, 0, 0], "cuda": [1, 1, 1]}
    assert by_attempt(resources(device="cpu").fit_gpu, of("perturbedvae")) == [0, 0, 0]
    assert by_attempt(resources(device="auto").gpu, None) == [1, 0, 0]


def test_methods_without_a_network_never_ask_for_a_gpu():
    assert by_attempt(resources(device="cuda").fit_gpu, of("additive")) == [0, 0, 0]


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_a_site_with_gres_is_asked_by_gres_wherever_others_are_asked_by_number(device):
    number, gres = resources(device=device), resources(device=device)
    gres.site_gres = "gpu:a100:1"
    for name, here in (("fit", of("perturbedvae")), ("fit", of("additive"))):
        asked = by_attempt(getattr(number, f"{name}_gpu"), here)
        assert by_attempt(getattr(gres, f"{name}_gres"), here) == ["gpu:a100:1" if n else "" for n in asked]
        assert by_attempt(getattr(gres, f"{name}_gpu"), here) == [0, 0, 0]
        assert by_attempt(getattr(number, f"{name}_gres"), here) == ["", "", ""]
    asked = by_attempt(number.gpu, None)
    assert by_attempt(gres.gres, None) == ["gpu:a100:1" if n else "" for n in asked]
    assert by_attempt(gres.gpu, None) == [0, 0, 0]
    assert gres.small_gres(None) == ("gpu:a100:1" if number.small_gpu(None) else "")
    assert gres.small_gpu(None) == 0


def test_small_networks_stay_on_the_cpu_unless_a_gpu_is_asked_for_by_name():
    found = {device: resources(device=device) for device in ("auto", "cpu", "cuda")}
    assert {name: (one.small_device, one.small_gpu(None)) for name, one in found.items()} == {
        "auto": ("cpu", 0), "cpu": ("cpu", 0), "cuda": ("cuda", 1),
    }  # fmt: skip


def test_the_gres_of_a_profile():
    assert read_gres(None) == read_gres({"mem_mb": 1}) == read_gres({GRES: SimpleNamespace(raw=None)}) == ""
    assert read_gres({GRES: SimpleNamespace(raw="'gpu:1'")}) == "gpu:1"


def test_memory_and_minutes_grow_by_attempt():
    assert by_attempt(grow(5), None) == [5, 10, 15]
    assert by_attempt(resources().of_method("runtime"), of("additive")) == [15, 30, 45]


def test_minutes_grow_with_the_cells(tmp_path):
    plan = Plan({"dataset": "simulation", "data": str(tmp_path)})
    ask = plan.resources.by_size(2, per_gb=1.5)
    assert by_attempt(ask, of("additive")) == [2, 4, 6]
    (tmp_path / "simulation").mkdir()
    with open(tmp_path / "simulation/prepared.h5ad", "wb") as handle:
        handle.truncate(2_000_000_001)
    assert by_attempt(ask, of("additive")) == [6, 12, 18]


def test_fits_of_seconds_share_a_submission_and_networks_have_their_own():
    plan = resources()
    assert plan.fit_group(of("additive")) == plan.fit_group(of("elastic_net")) == "fit"
    assert plan.fit_group(of("perturbedvae")) is None


def test_no_rule_repeats_inside_its_submission():
    """A rule's own `retries` run within the same Slurm job, where attempt 2 has the memory of attempt 1."""
    for path in [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]:
        assert not re.search(r"^\s*retries\s*:", path.read_text(), flags=re.MULTILINE), path


def test_every_rule_that_is_handed_the_device_can_ask_for_a_gpu():
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^ *rule\b", path.read_text(), flags=re.MULTILINE)[1:]:
            if "--device" in rule:
                assert re.search(r"^ +gpu=plan\.resources\.", rule, flags=re.MULTILINE), rule
                assert re.search(r"^ +gres=plan\.resources\.", rule, flags=re.MULTILINE), rule
