"""Axes between two arms: kinds, permutations within studies, halves, composition held equal."""

from __future__ import annotations

import numpy as np
import pytest

from perturbed.axis.axes import (
    balanced_axis,
    half_weights,
    make_axes,
    observed_weights,
    permute_labels,
    read_axis,
    sum_donors,
)
from perturbed.errors import DataError

ARM = np.array([0, 0, 0, 1, 1, 0, 1, 1])
STUDY = np.array(["a", "a", "b", "a", "b", "b", "b", "c"], dtype=object)


def test_donors_weigh_alike_or_by_their_cells():
    rng = np.random.default_rng(0)
    donor = np.repeat(np.arange(8), [3, 40, 5, 9, 2, 7, 30, 4])
    z = rng.normal(size=(len(donor), 4)) + donor[:, None]
    sums = sum_donors(z, donor, ARM[donor], 8)
    by_cells = z[ARM[donor] == 1].mean(axis=0) - z[ARM[donor] == 0].mean(axis=0)
    per_donor = np.array([z[donor == d].mean(axis=0) for d in range(8)])
    by_donors = per_donor[ARM == 1].mean(axis=0) - per_donor[ARM == 0].mean(axis=0)
    np.testing.assert_allclose(make_axes("means", sums, observed_weights(ARM))[0], by_cells)
    np.testing.assert_allclose(make_axes("donors", sums, observed_weights(ARM))[0], by_donors)
    assert np.abs(by_cells - by_donors).max() > 0.5


def test_discriminant_turns_away_from_noise():
    rng = np.random.default_rng(1)
    donor = rng.integers(0, 8, 4000)
    noise = rng.normal(size=(4000, 2)) @ np.array([[3.0, 3.0], [-0.3, 0.3]])
    z = noise + ARM[donor][:, None] * np.array([1.0, 0.0])
    axis = make_axes("discriminant", sum_donors(z, donor, ARM[donor], 8, second=True), observed_weights(ARM))[0]
    within = np.cov(noise.T)
    wanted = np.linalg.solve(within, [1.0, 0.0])
    assert axis @ wanted / np.linalg.norm(axis) / np.linalg.norm(wanted) > 0.98


def test_permuted_labels_keep_the_counts_of_every_study():
    found = permute_labels(ARM, STUDY, 1000, seed=0)
    labels = found.weights.perturbed
    assert found.exact and found.n_possible == 3 * 6 == labels.shape[1]
    assert len({tuple(column) for column in labels.T}) == 18 and any((column == ARM).all() for column in labels.T)
    assert found.mixed == ("a", "b")
    drawn = permute_labels(ARM, STUDY, 10, seed=0)
    assert not drawn.exact and drawn.weights.perturbed.shape[1] == 10
    for column in (*labels.T, *drawn.weights.perturbed.T):
        for name in "abc":
            assert column[name == STUDY].sum() == ARM[name == STUDY].sum()
    np.testing.assert_array_equal(found.weights.unperturbed + labels, 1)


def test_donors_that_take_no_part_stay_out():
    arm = np.where(np.arange(8) == 4, -1, ARM)
    found = permute_labels(arm, STUDY, 1000, seed=0)
    assert (found.weights.perturbed[4] == 0).all() and (found.weights.unperturbed[4] == 0).all()
    for half in half_weights(arm, 5, seed=0):
        assert (half.perturbed[4] == 0).all()


def test_halves_share_no_donor():
    first, second = half_weights(ARM, 20, seed=0)
    for k in (0, 1):
        np.testing.assert_array_equal(first[k].sum(axis=0), 2)
        assert (first[k] * second[k] == 0).all() and (first[k][k != ARM] == 0).all()
    assert len({tuple(column) for column in first[0].T}) > 1


def test_composition_held_equal_takes_the_types_out_of_the_axis():
    """Arms differ in their shares of types, and along the last latent within each type."""
    rng = np.random.default_rng(2)
    n = 2000
    arm = np.repeat([0, 1], n)
    kind = np.where(rng.random(2 * n) < np.where(arm, 0.8, 0.3), "a", "b").astype(object)
    z = rng.normal(0, 0.1, (2 * n, 3))
    z[:, 0] += 3 * (kind == "a")
    z[:, 2] += np.where(kind == "a", 1.0, 0.4) * arm
    naive = z[arm == 1].mean(axis=0) - z[arm == 0].mean(axis=0)
    assert naive[0] > 1.3
    equal = balanced_axis(z, arm, kind, ["a", "b"], "equal")
    np.testing.assert_allclose(equal, [0, 0, 0.7], atol=0.02)
    pooled = balanced_axis(z, arm, kind, ["a", "b"], "pooled")
    share = (kind == "a").mean()
    np.testing.assert_allclose(pooled, [0, 0, share + 0.4 * (1 - share)], atol=0.02)


def test_a_given_axis_must_fit(tmp_path):
    path = tmp_path / "axis.csv"
    path.write_text("axis\n1\n-2\n")
    np.testing.assert_array_equal(read_axis(str(path), 2), [1, -2])
    with pytest.raises(DataError, match="must hold 3 finite numbers"):
        read_axis(str(path), 3)
    path.write_text("a\n1\n")
    with pytest.raises(DataError, match="no table with a column `axis`"):
        read_axis(str(path), 1)
