"""Training data that stay on disk hold what those in memory hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from data_world import make_fold, make_prepared
from perturbed.checkpoints import fingerprint
from perturbed.data import streaming
from perturbed.data.streaming import StreamedMatrix
from perturbed.models.inputs import load_training_data
from perturbed.resident import ResidentCells

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
