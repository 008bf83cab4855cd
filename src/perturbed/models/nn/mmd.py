"""Maximum mean discrepancy between two samples as a loss, by matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    if x.dtype in (torch.bfloat16, torch.float16):  # the products would drown in rounding
        x, y = x.float(), y.float()
    n, widths = len(x), tuple(bandwidths)
    if group is None:
        ones = x.new_ones(())
        return _Discrepancy.apply(x, y, widths, ones / n**2, ones / len(y) ** 2, ones / (n * len(y)))
    rows, there = _members(group)
    if rows.numel() <= MAX_PADDING * n:
        # By index_select, whose gradient adds whole rows; that of x[rows] adds value by value.
        x, y = (cells.index_select(0, rows.flatten()).unflatten(0, rows.shape) for cells in (x, y))
        weight = (there[:, :, None] & there[:, None, :]).to(x.dtype) / (there.sum(1)[:, None, None] * n)
    else:
        same = (group[:, None] == group[None, :]).to(x.dtype)
        weight = same / (same.sum(1, keepdim=True) * n)
    return _Discrepancy.apply(x, y, widths, weight, weight, weight)


class _Discrepancy(torch.autograd.Function):
    """`Σ w_xx k(x, x') + Σ w_yy k(y, y') − 2 Σ w_xy k(x, y)` with its gradient in closed form.

    With `c = w · k'(‖a − b‖²)` the gradient to x_i is `4 Σ_j c_xx,ij (x_i − x_j) − 4 Σ_j c_xy,ij (x_i − y_j)`: two
    small products, where autograd through the distances of all rows at once takes four times the work, half of it for
    y, which is data.
    Leading dimensions are groups. Distances are `‖a‖² + ‖b‖² − 2 a·b` of centred rows; the centre is a constant, for
    distances do not depend on it. In float32 their error is about 1e-7 times the squared distance from the centre.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, widths: tuple[float, ...], w_xx: Tensor, w_yy: Tensor, w_xy: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            centre = torch.cat([x, y], dim=-2).mean(-2, keepdim=True)
            x, y = x - centre, y - centre
            xx, yy, xy = x @ x.mT, y @ y.mT, x @ y.mT
        # Norms from the diagonal of the same product, so that nothing is left of a cell's distance to itself.
        norm_x, norm_y = (inner.diagonal(dim1=-2, dim2=-1).clone() for inner in (xx, yy))
        k_xx, c_xx = _kernel(xx, norm_x, norm_x, widths)
        k_yy, c_yy = _kernel(yy, norm_y, norm_y, widths)
        k_xy, c_xy = _kernel(xy, norm_x, norm_y, widths)
        ctx.save_for_backward(x, y, w_xx * c_xx, w_yy * c_yy, w_xy * c_xy)
        return (w_xx * k_xx).sum() + (w_yy * k_yy).sum() - 2 * (w_xy * k_xy).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, c_xx, c_yy, c_xy = ctx.saved_tensors
        to_x = to_y = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                own = c_xx.sum(-1, keepdim=True) - c_xy.sum(-1, keepdim=True)
                to_x = 4 * grad * (own * x - c_xx @ x + c_xy @ y)
            if ctx.needs_input_grad[1]:
                own = c_yy.sum(-1, keepdim=True) - c_xy.sum(-2)[..., None]
                to_y = 4 * grad * (own * y - c_yy @ y + c_xy.mT @ x)
        return to_x, to_y, None, None, None, None


def _kernel(inner: Tensor, first: Tensor, second: Tensor, widths: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Sum of Gaussian kernels, and its derivative by the squared distance, from inner products and squared norms."""
    squared = (first[..., :, None] + second[..., None, :] - 2 * inner).clamp(min=0)
    kernel, slope = torch.zeros_like(squared), torch.zeros_like(squared)
    for width in widths:
        part = torch.exp(squared / -width)
        kernel += part
        slope -= part / width
    return kernel, slope


def _members(group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each group (n_groups, most rows of any), filled up with its first, and which of them are its own."""
    _, which, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(which, stable=True)
    start = sizes.cumsum(0) - sizes
    place = torch.arange(int(sizes.max()), device=group.device)
    there = place[None, :] < sizes[:, None]
    return order[start[:, None] + torch.where(there, place[None, :], 0)], there
