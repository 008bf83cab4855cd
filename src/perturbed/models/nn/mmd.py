"""Maximum mean discrepancy between two samples as a loss, by matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_PADDING = 4
"""Groups are laid side by side where filling them up to one size copies at most this many times the cells. Pairs across
groups, most of a batch's, are then never formed."""


def multiscale_bandwidths(width: float = 1000.0, *, factor: float = 2.0, n_kernels: int = 10) -> tuple[float, ...]:
    """Widths of a family of Gaussian kernels around `width`.

    `wᵢ = width · factor^(i − n_kernels // 2)`, i = 0 … n_kernels − 1: the family of the discrepancy-VAE, whose width is
    1000 (SENA: 200), factor 2 and number of kernels 10.

    Raises
    ------
    ValueError
        If a width would not be positive or there is no kernel.
    """
    if width <= 0 or factor <= 0 or n_kernels < 1:
        raise ValueError(
            f"width and factor must be positive and n_kernels at least 1, got {width}, {factor}, {n_kernels}"
        )
    return tuple(width * factor ** (i - n_kernels // 2) for i in range(n_kernels))


def pairwise_squared_distances(cells: Tensor) -> Tensor:
    """Squared Euclidean distance between all rows, without forming the differences.

    `‖a − b‖² = ‖a‖² + ‖b‖² − 2 a·b` on centred rows. The centre is a constant to the gradient: distances do not depend
    on it. What rounding leaves below 0 is 0, and the diagonal is exactly 0.

    Parameters
    ----------
    cells
        (..., n_cells, n_genes). In float32 the error is about 1e-7 times the squared distance from the centre.

    Returns
    -------
    Tensor
        (..., n_cells, n_cells), symmetric up to rounding.
    """
    with torch.autocast(cells.device.type, enabled=False):  # in bfloat16 the products would drown in rounding
        centred = cells - cells.detach().mean(-2, keepdim=True)
        inner = centred @ centred.mT
    # The diagonal of the same product, so that nothing is left of a cell's distance to itself.
    norms = inner.diagonal(dim1=-2, dim2=-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * inner).clamp(min=0)


def gaussian_mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float], group: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy with a sum of Gaussian kernels, as a V-statistic.

    `mean k(x, x') + mean k(y, y') − 2 mean k(x, y)` with `k(a, b) = Σᵢ exp(−‖a − b‖² / wᵢ)`, the loss of the
    discrepancy-VAE (Zhang et al. 2023). Pairs of a cell with itself count, so the value is never negative (up to
    rounding) and lies above 0 for two samples of one distribution, by about `2 · (k(0) − mean k) / n`.

    Parameters
    ----------
    x, y
        Generated and observed cells (n_x, n_genes), (n_y, n_genes).
    bandwidths
        Widths wᵢ, on the scale of squared distances; see `multiscale_bandwidths`.
    group
        Group of each row, the same for `x` and `y` (n,), which then hold equally many. Cells are compared within their
        group only, and the result is the mean over the cells of their group's discrepancy.

    Returns
    -------
    Tensor
        Scalar, differentiable in both samples.

    Raises
    ------
    ValueError
        If a group is given and `x` and `y` differ in length from it.
    """
    if group is not None and not len(x) == len(y) == len(group):
        raise ValueError(f"group: {len(group)} rows for {len(x)} and {len(y)} cells; they must be equally many")
    n = len(x)
    if group is None:
        kernel = _kernel(torch.cat([x, y]), bandwidths)
        return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    rows, there = _members(group)
    if rows.numel() <= MAX_PADDING * n:
        size = rows.shape[1]
        kernel = _kernel(torch.cat([x[rows], y[rows]], dim=1), bandwidths)
        weight = (there[:, :, None] & there[:, None, :]).to(kernel.dtype) / (there.sum(1)[:, None, None] * n)
    else:
        size = n
        kernel = _kernel(torch.cat([x, y]), bandwidths)
        same = (group[:, None] == group[None, :]).to(kernel.dtype)
        weight = same / (same.sum(1, keepdim=True) * n)
    within = kernel[..., :size, :size] + kernel[..., size:, size:] - 2 * kernel[..., :size, size:]
    return (weight * within).sum()


def _kernel(cells: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Sum of Gaussian kernels between all rows (..., n_cells, n_cells)."""
    squared = pairwise_squared_distances(cells)
    total = torch.exp(-squared / bandwidths[0])
    for width in bandwidths[1:]:
        total = total + torch.exp(-squared / width)
    return total


def _members(group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each group (n_groups, most rows of any), filled up with its first, and which of them are its own."""
    _, which, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(which, stable=True)
    start = sizes.cumsum(0) - sizes
    place = torch.arange(int(sizes.max()), device=group.device)
    there = place[None, :] < sizes[:, None]
    return order[start[:, None] + torch.where(there, place[None, :], 0)], there
