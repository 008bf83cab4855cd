from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from perturbed.resident import ResidentCells, choose_placement


@pytest.fixture
def matrix() -> sparse.csr_matrix:
    return sparse.random(9000, 7, 0.3, "csr", dtype=np.float32, random_state=np.random.default_rng(0))


@pytest.mark.parametrize("placement", ["sparse", "dense_half", "streamed"])
def test_every_placement_gives_the_rows_asked_for(matrix, placement):
    rows = np.array([8999, 0, 17, 17, 5000])
    found = ResidentCells(matrix, "cpu", placement).take(rows)
    assert found.dtype == torch.float32
    expected = matrix[rows].toarray()
    if placement == "sparse":
        np.testing.assert_array_equal(found.numpy(), expected)
    else:  # both halves round alike, so that free memory changes no result
        np.testing.assert_array_equal(found.numpy(), expected.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(found.numpy(), expected, rtol=2**-11)


def test_the_placement_follows_device_and_free_memory(matrix):
    assert choose_placement(matrix, "cpu") == "sparse"
    need = 2 * 9000 * 7
    assert choose_placement(matrix, "cuda", free_bytes=2 * need) == "dense_half"
    assert choose_placement(matrix, "cuda", free_bytes=2 * need - 2) == "streamed"


@pytest.mark.parametrize("placement", ["dense_half", "streamed"])
def test_values_too_large_for_half_precision_are_refused(matrix, placement):
    matrix.data[3] = 1e5
    with pytest.raises(ValueError, match="half precision"):
        ResidentCells(matrix, "cpu", placement)
    assert ResidentCells(matrix, "cpu", "sparse").take(np.array([0])).shape == (1, 7)
