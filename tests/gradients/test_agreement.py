from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_decoders import Linear, Toy

from perturbed.gradients.agreement import arrivals, compare_with_shift, cosine, match_genes, mean_gradients
from perturbed.gradients.flow import Move, velocity


def world(shift, flow, n=300, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2 * n, 4))
    perturbed = np.arange(2 * n) >= n
    z[perturbed] += shift
    return rng.normal(size=(2 * n, 4)) * 0.3 + flow, z, perturbed


def test_a_flow_along_the_shift_is_found_with_an_interval_above_zero():
    flow, z, perturbed = world(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]))
    found = compare_with_shift(flow, z, perturbed, n_bootstrap=200, n_permutations=199)
    assert found.cosine > 0.95 and found.low > 0.9 and found.low <= found.cosine <= found.high
    assert found.p == pytest.approx(1 / 200) and abs(found.null_mean) < 0.2
    against = compare_with_shift(-flow, z, perturbed, n_bootstrap=200, n_permutations=199)
    assert against.cosine == pytest.approx(-found.cosine) and against.p > 0.9


def test_without_a_shift_the_test_keeps_its_level():
    p = []
    for seed in range(60):
        flow, z, perturbed = world(np.zeros(4), np.array([1.0, 0, 0, 0]), n=40, seed=seed)
        p.append(compare_with_shift(flow, z, perturbed, n_bootstrap=10, n_permutations=99, seed=seed).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.15 and 0.3 < np.mean(p) < 0.7


def test_the_cosine_is_that_of_the_means():
    flow, z, perturbed = world(np.array([0.5, -1, 0, 0]), np.array([1.0, 0.3, 0, 0]))
    found = compare_with_shift(flow, z, perturbed, n_bootstrap=10, n_permutations=10)
    a = np.mean([flow[i] for i in range(len(z)) if not perturbed[i]], axis=0)
    b = np.mean([z[i] for i in range(len(z)) if perturbed[i]], axis=0)
    b = b - np.mean([z[i] for i in range(len(z)) if not perturbed[i]], axis=0)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_replicates_are_the_unit_where_there_are_any():
    flow, z, perturbed = world(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]))
    donors = np.array([f"d{i % 5}" for i in range(len(z))])
    donor_shift = np.random.default_rng(1).normal(size=(5, 4))
    z = z + np.array([donor_shift[int(d[1])] for d in donors]) * perturbed[:, None]
    cells = compare_with_shift(flow, z, perturbed, n_bootstrap=200, n_permutations=99)
    units = compare_with_shift(flow, z, perturbed, replicates=donors, n_bootstrap=200, n_permutations=99)
    assert units.n_units == 10 and cells.n_units == len(z)
    assert units.high - units.low > 3 * (cells.high - cells.low)
    with pytest.raises(ValueError, match="at least 2"):
        compare_with_shift(flow, z, perturbed, replicates=np.where(perturbed, "a", "b"))


def test_mean_gradients_equal_the_mean_of_each_genes_velocity():
    decoder = Toy("softmax")
    z = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    groups = np.array([0] * 5 + [2] * 7)
    got = mean_gradients(decoder, z, {}, groups, 3, memory_mb=1e-4)
    assert got.shape == (3, 7, 3) and not got[1].any()
    for g in range(7):
        each = velocity(decoder, z, {}, [Move((f"g{g}",))]).numpy()
        np.testing.assert_allclose(got[0, g], each[:5].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(got[2, g], each[5:].mean(axis=0), atol=1e-6)


def test_matched_genes_are_expressed_alike_and_never_targets():
    rng = np.random.default_rng(0)
    mean, variance = rng.gamma(1, 1, 500), rng.gamma(1, 1, 500)
    targets = np.array([3, 77])
    chosen = match_genes(mean, variance, targets, 20)
    assert chosen.shape == (2, 20) and not np.isin(chosen, targets).any()
    rank = np.argsort(np.argsort(mean))
    for row, target in enumerate(targets):
        assert len(set(chosen[row])) == 20
        assert np.abs(rank[chosen[row]] - rank[target]).mean() < 130  # 250 by chance at the most, 167 on average
    np.testing.assert_array_equal(chosen, match_genes(mean, variance, targets, 20))


def test_arrivals_and_cosines_by_hand():
    assert arrivals(np.array([[0.4, 0], [0.6, 0]]), np.zeros(2), np.array([1.0, 0])).tolist() == [False, True]
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1.0])) == pytest.approx(np.sqrt(0.5))
    assert np.isnan(cosine(np.zeros(2), np.ones(2)))
    decoder = Linear(torch.eye(2))
    assert velocity(decoder, torch.zeros(1, 2), {}, [Move(("g0",))]).tolist() == [[1.0, 0.0]]
