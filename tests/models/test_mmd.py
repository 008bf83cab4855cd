"""The discrepancy loss against the obvious expansion of all pairs, and what it promises as a loss."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from perturbed.evaluation.distances import mmd_multiscale
from perturbed.models.nn.mmd import gaussian_mmd, multiscale_bandwidths

WIDTHS = multiscale_bandwidths(20.0)


def expanded_mmd(x: torch.Tensor, y: torch.Tensor, bandwidths) -> torch.Tensor:
    """Every pair written out."""

    def kernel(a, b):
        return sum(torch.exp(-(a - b).square().sum() / w) for w in bandwidths)

    def mean(first, second):
        return torch.stack([kernel(a, b) for a in first for b in second]).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def sample(n: int, n_genes: int = 7, seed: int = 0, shift: float = 0.0, dtype=torch.double) -> torch.Tensor:
    return torch.randn(n, n_genes, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + shift


def test_value_is_that_of_all_pairs():
    x, y = sample(6), sample(9, seed=1, shift=0.7)
    torch.testing.assert_close(gaussian_mmd(x, y, WIDTHS), expanded_mmd(x, y, WIDTHS))
    torch.testing.assert_close(gaussian_mmd(x, y, (3.0,)), expanded_mmd(x, y, (3.0,)))


def test_gradient_is_that_of_all_pairs():
    x, y = sample(5).requires_grad_(), sample(4, seed=1, shift=0.7).requires_grad_()
    found = torch.autograd.grad(gaussian_mmd(x, y, WIDTHS), (x, y))
    wanted = torch.autograd.grad(expanded_mmd(x, y, WIDTHS), (x, y))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("padding", [0, 4])
def test_groups_are_compared_within_themselves(padding, monkeypatch):
    monkeypatch.setattr("perturbed.models.nn.mmd.MAX_PADDING", padding)  # 0: all pairs are formed, and masked
    x, y = sample(9), sample(9, seed=1, shift=0.7)
    group = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 2])
    parts = [(group == g, int((group == g).sum())) for g in range(3)]
    wanted = sum(n * expanded_mmd(x[rows], y[rows], WIDTHS) for rows, n in parts) / 9
    torch.testing.assert_close(gaussian_mmd(x, y, WIDTHS, group), wanted)
    x, y = x.requires_grad_(), y.requires_grad_()
    parts = sum(n * expanded_mmd(x[rows], y[rows], WIDTHS) for rows, n in parts) / 9
    for found, expected in zip(*(torch.autograd.grad(v, (x, y)) for v in (gaussian_mmd(x, y, WIDTHS, group), parts))):
        torch.testing.assert_close(found, expected)
    one_group = torch.zeros(9, dtype=torch.long)
    torch.testing.assert_close(gaussian_mmd(x, y, WIDTHS, one_group), gaussian_mmd(x, y, WIDTHS))
    with pytest.raises(ValueError, match="equally many"):
        gaussian_mmd(x, y[:8], WIDTHS, group)


def test_single_precision_survives_cells_far_from_the_origin():
    """Expression lies near its mean, far from 0; without centring the distances would drown in rounding."""
    x, y = sample(20, 500, shift=100.0), sample(20, 500, seed=1, shift=100.1)
    widths = multiscale_bandwidths()
    exact = gaussian_mmd(x, y, widths)
    torch.testing.assert_close(gaussian_mmd(x.float(), y.float(), widths).double(), exact, rtol=1e-3, atol=1e-6)
    assert gaussian_mmd(x.float(), x.float(), widths).abs() < 1e-6


def test_mixed_precision_leaves_the_distances_alone():
    x, y = sample(20, 500, dtype=torch.float32), sample(20, 500, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gaussian_mmd(x, y, multiscale_bandwidths())
    assert torch.equal(inside, gaussian_mmd(x, y, multiscale_bandwidths()))


def test_it_is_zero_between_a_sample_and_itself_and_grows_with_the_shift():
    x = sample(30)
    assert gaussian_mmd(x, x, WIDTHS).abs() < 1e-12
    values = [gaussian_mmd(x, x + shift, WIDTHS) for shift in (0.1, 0.5, 1.0, 2.0)]
    assert all(b > a > 0 for a, b in pairwise(values))


def test_two_samples_of_one_distribution_differ_by_the_bias_of_the_statistic_only():
    """Null: the V-statistic's expectation is 2 (k(0) − E k) / n, and the loss of a shifted sample lies far above."""
    n, repeats = 40, 50
    null = [gaussian_mmd(sample(n, seed=2 * i), sample(n, seed=2 * i + 1), WIDTHS).item() for i in range(repeats)]
    squared = (sample(2000, seed=900) - sample(2000, seed=901)).square().sum(1)
    expected = 2 / n * (len(WIDTHS) - sum(torch.exp(-squared / w) for w in WIDTHS).mean().item())
    assert abs(np.mean(null) - expected) < 4 * np.std(null) / np.sqrt(repeats) + 0.01 * expected
    assert gaussian_mmd(sample(n), sample(n, seed=1, shift=1.0), WIDTHS) > 3 * max(null)


def test_the_loss_is_the_metric_of_the_evaluation():
    x, y = sample(12, 50, shift=3.0), sample(15, 50, seed=1)
    found = gaussian_mmd(x, y, multiscale_bandwidths(300.0, factor=1.5, n_kernels=7))
    wanted = mmd_multiscale(x.numpy(), y.numpy(), width=300.0, factor=1.5, n_kernels=7)
    assert found.item() == pytest.approx(wanted)


def test_published_widths():
    assert multiscale_bandwidths() == tuple(1000.0 / 32 * 2**i for i in range(10))
    for wrong in ({"width": 0.0}, {"factor": -1.0}, {"n_kernels": 0}):
        with pytest.raises(ValueError, match="n_kernels"):
            multiscale_bandwidths(**wrong)
