"""Training data that stay on disk hold what those in memory hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from data_world import make_fold, make_prepared
from perturbed.checkpoints import fingerprint
from perturbed.data import streaming
from perturbed.data.streaming import StreamedMatrix
from perturbed.models.inputs import load_training_data
from perturbed.plan import Plan
from perturbed.resident import ResidentCells

ROOT = Path(__file__).parents[2]
TINY = 1e-9


@pytest.fixture
def fold(tmp_path):
    prepared = make_prepared(tmp_path)
    return (prepared, *make_fold(tmp_path, prepared))


def test_only_what_outgrows_memory_and_may_stay_on_disk_does(fold, monkeypatch):
    monkeypatch.delenv("PERTURBED_MEMORY_GB", raising=False)
    assert isinstance(load_training_data(*fold, streams=True).X, sparse.csr_matrix)
    assert isinstance(load_training_data(*fold, memory_gb=TINY).X, sparse.csr_matrix)
    assert isinstance(load_training_data(*fold, streams=True, memory_gb=TINY).X, StreamedMatrix)
    monkeypatch.setenv("PERTURBED_MEMORY_GB", str(TINY))
    data = load_training_data(*fold, streams=True)
    assert isinstance(data.X, StreamedMatrix) and isinstance(data.counts, StreamedMatrix)


def test_values_are_the_same(fold):
    held, left = load_training_data(*fold), load_training_data(*fold, streams=True, memory_gb=TINY)
    every = np.arange(held.X.shape[0])
    assert held.counts is not None and left.counts is not None
    assert left.X.shape == held.X.shape
    np.testing.assert_array_equal(left.X[every].toarray(), held.X.toarray())
    np.testing.assert_array_equal(left.counts[every].toarray(), held.counts.toarray())
    np.testing.assert_array_equal(left.library, held.library)
    assert list(left.cells) == list(held.cells) and left.genes == held.genes
    np.testing.assert_array_equal(streaming.take_rows(left.X, every[::2]).sum(0), left.X[every[::2]].toarray().sum(0, keepdims=True, dtype=np.float64))  # fmt: skip  # noqa: E501


def test_batches_are_the_same_on_the_device(fold):
    held, left = (load_training_data(*fold, streams=streams, memory_gb=TINY) for streams in (False, True))
    rows = np.array([5, 0, 60, 5, 17])
    cells = ResidentCells(left.X)
    assert cells.placement == "on_disk"
    left.X.pin(np.array([0, 60]))
    assert cells.take(rows).numpy().tobytes() == ResidentCells(held.X).take(rows).numpy().tobytes()


def test_the_fingerprint_is_of_the_values(fold, tmp_path):
    from perturbed.training import TrainingOptions

    one, two = (load_training_data(*fold, streams=True, memory_gb=TINY) for _ in range(2))
    assert fingerprint(one, TrainingOptions(), 0) == fingerprint(two, TrainingOptions(), 0)
    assert fingerprint(one, TrainingOptions(), 0) != fingerprint(one, TrainingOptions(), 1)
    folder = tmp_path / "other"
    folder.mkdir()
    prepared = make_prepared(folder, prepare={"target_sum": 5000})
    other = load_training_data(prepared, *make_fold(folder, prepared), streams=True, memory_gb=TINY)
    assert fingerprint(one, TrainingOptions(), 0) != fingerprint(other, TrainingOptions(), 0)


@pytest.mark.parametrize("available", [10**3, 10**13], ids=["first attempt", "with more memory"])
def test_a_retry_with_more_memory_takes_the_cells_in_the_order_of_the_first(fold, available, monkeypatch):
    """What the rule `fit` passes depends on the config, so that a checkpoint of any attempt is one of all."""
    monkeypatch.setattr(streaming, "available_memory", lambda: available)
    job = SimpleNamespace(method="perturbedvae")
    run = {"dataset": "simulation", "methods": ["perturbedvae", "additive"]}
    for config, kind in ((run, sparse.csr_matrix), ({**run, "memory_gb": TINY}, StreamedMatrix)):
        budget = Plan(config).resources.cells_gb(job)
        assert isinstance(load_training_data(*fold, streams=True, memory_gb=budget).X, kind)


def test_the_budget_of_a_fit_is_half_of_what_its_first_attempt_asks_for_or_what_the_config_says():
    job, run = (
        SimpleNamespace(method="perturbedvae"),
        {"dataset": "simulation", "methods": ["perturbedvae", "additive"]},
    )
    plan = Plan(run)
    assert plan.resources.cells_gb(job) * 2000 == plan.resources.of_method("mem_mb")(job, 1)
    assert Plan({**run, "memory_gb": 24}).resources.cells_gb(job) == 24
    rule = (ROOT / "workflow/rules/methods.smk").read_text()
    assert "memory_gb=plan.resources.cells_gb," in rule and "--memory-gb {params.memory_gb}" in rule


def test_prepare_asks_for_what_streaming_needs_and_no_more():
    asks = Plan({"dataset": "simulation", "methods": ["additive"]}).resources.prepare
    sizes = {1: 4000, 1000: 8000, 3000: 17_200, 400_000: 176_000}
    for size, needed in sizes.items():
        for attempt in (1, 2):
            assert asks(None, SimpleNamespace(size_mb=size), attempt) == attempt * needed
