"""Distances between samples against loops, their axioms and their values under no difference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbed.evaluation.distances import (
    energy_distance,
    median_bandwidth,
    mmd_multiscale,
    mmd_rbf,
    squared_distances,
)


def samples(seed: int = 0, n: int = 9, m: int = 7, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(0.5, 2.0, size=(m, d))


def euclid(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).sum()))


def slow_energy(x: np.ndarray, y: np.ndarray) -> float:
    between = np.mean([euclid(a, b) for a in x for b in y])
    within = [np.mean([euclid(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    return float(2 * between - sum(within))


def test_against_loops() -> None:
    x, y = samples()
    np.testing.assert_allclose(squared_distances(x, y), [[euclid(a, b) ** 2 for b in y] for a in x], rtol=1e-10)
    assert energy_distance(x, y) == pytest.approx(slow_energy(x, y), rel=1e-10)
    assert median_bandwidth(x) == pytest.approx(np.median([euclid(a, b) for a, b in itertools.combinations(x, 2)]))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-(euclid(a, b) ** 2) / (2 * 1.7**2)))

    within = sum(np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y))
    expected = within - 2 * np.mean([k(a, b) for a in x for b in y])
    assert mmd_rbf(x, y, 1.7) == pytest.approx(expected, rel=1e-9)


def test_multiscale_is_the_predecessors() -> None:
    """Ten kernels exp(-d²/w), w = 1000/32 · 2^i, every pair counted, over the stacked sample as that code does it."""
    x, y = samples(n=6, m=6, d=30)
    total = np.vstack([x, y]) * 8
    kernel = np.zeros((12, 12))
    for i in range(10):
        width = 1000 / 2.0 ** (10 // 2) * 2.0**i
        for a in range(12):
            for b in range(12):
                kernel[a, b] += np.exp(-((total[a] - total[b]) ** 2).sum() / width)
    expected = np.mean(kernel[:6, :6] + kernel[6:, 6:] - kernel[:6, 6:] - kernel[6:, :6])
    assert mmd_multiscale(x * 8, y * 8) == pytest.approx(expected, rel=1e-9)
    assert mmd_multiscale(x, x) == pytest.approx(0, abs=1e-12)


def test_by_hand() -> None:
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [4.0]])
    # between: 1, 4, 1, 2 -> mean 2; within x: 2; within y: 3
    assert energy_distance(x, y) == pytest.approx(2 * 2 - 2 - 3)
    assert median_bandwidth(np.array([[0.0], [1.0], [3.0]])) == 2.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_axioms(seed: int, shift: float) -> None:
    x, y = samples(seed)
    order = np.random.default_rng(seed).permutation(x.shape[1])
    for distance in (energy_distance, mmd_multiscale, lambda a, b: mmd_rbf(a, b, 1.3)):
        value = distance(x, y)
        assert distance(y, x) == pytest.approx(value, rel=1e-8, abs=1e-10)  # symmetric
        assert distance(x[::-1], y) == pytest.approx(value, rel=1e-8, abs=1e-10)  # order of cells
        assert distance(x[:, order], y[:, order]) == pytest.approx(value, rel=1e-8, abs=1e-10)  # order of genes
        assert distance(x + shift, y + shift) == pytest.approx(value, rel=1e-6, abs=1e-8)  # only differences count
    assert energy_distance(3 * x, 3 * y) == pytest.approx(3 * energy_distance(x, y), rel=1e-8)


def test_null_and_sample_size() -> None:
    """Without a difference the unbiased ones scatter about 0 at every size; the V-statistic does not."""
    rng = np.random.default_rng(4)
    for n in (5, 40):
        draws = [(rng.normal(size=(n, 20)), rng.normal(size=(n, 20))) for _ in range(200)]
        for distance in (energy_distance, lambda a, b: mmd_rbf(a, b, 6.0)):
            values = np.array([distance(x, y) for x, y in draws])
            assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
            assert (values < 0).any()
    assert np.mean([mmd_multiscale(x * 5, y * 5) for x, y in draws]) > 0.05


def test_a_larger_shift_is_farther() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 10))
    for distance in (energy_distance, mmd_multiscale, lambda a, b: mmd_rbf(a, b, 4.0)):
        values = [distance(x, rng.normal(size=(60, 10)) + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
        assert np.all(np.diff(values) > 0)
