"""Exact derivatives of a decoder's outputs with respect to z, in bounded memory.

Three ways, equal up to rounding:

- **forward**: directional derivatives of all outputs along one direction per cell (`along`), one pass;
- **reverse**: gradients of a few readouts (`gradients_of`), one pass each; `gradients` chooses between the two;
- **by matrix products**: where `expression = link(W hidden(z) + b)`, the Jacobian of a cell is `D (W − 1 w̄ᵀ) J`, with J
  the small Jacobian of the hidden layer, D the diagonal of the link's slope and, for softmax only, `w̄ = Wᵀ p`. J costs
  one forward pass per latent through the hidden layers alone; the rest is one matrix product per chunk of cells.

No array of cells × genes × latents is ever held: cells pass in chunks whose Jacobian fits `memory_mb`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from perturbed.decoders.base import Context, Decoder, LastLayer, chunks, take

MEMORY_MB = 32.0
"""Default budget of a chunk's Jacobian, the largest temporary array; what fits a processor's cache is fastest."""
TANGENT_COPIES = 3
"""Arrays of a Jacobian's size that forward mode holds at a time."""


class CellJacobian(NamedTuple):
    """Derivatives of the outputs of some cells."""

    cells: slice
    """Which cells."""
    values: Tensor
    """Derivatives of `expression`, or of its logits, up to the factor `slope` (n_genes, n_chunk, n_latent)."""
    slope: Tensor
    """Positive factor from `values` to the derivative of the expression (n_genes, n_chunk)."""
    projected: Tensor | None
    """`values` along the given direction of each cell (n_genes, n_chunk)."""


def along(decoder: Decoder, z: Tensor, context: Context, direction: Tensor, *, memory_mb: float = MEMORY_MB) -> Tensor:
    """Directional derivatives of all outputs, by forward mode.

    Parameters
    ----------
    decoder
        The decoder.
    z
        Latents (n_cells, n_latent).
    context
        Their context.
    direction
        One direction per cell (n_cells, n_latent), or one for all (n_latent,).
    memory_mb
        Budget of the largest temporary array.

    Returns
    -------
    Tensor
        (n_cells, n_genes + n_heads); cost: about two decodings.
    """
    direction = direction.expand_as(z)
    parts = []
    for rows in chunks(len(z), cells_in(memory_mb, 4 * (len(decoder.genes) + len(decoder.heads)))):
        inside = take(context, rows)
        parts.append(jvp(lambda x, c=inside: decoder.outputs(x, c), (z[rows],), (direction[rows],))[1])
    return torch.cat(parts)


def gradients(
    decoder: Decoder,
    z: Tensor,
    context: Context,
    outputs: Sequence[str] | Tensor,
    *,
    memory_mb: float = MEMORY_MB,
) -> Tensor:
    """Gradients of outputs, or of linear readouts of them, in the cheaper mode.

    Reverse mode costs one pass through the decoder per output, forward mode one per latent (of all outputs), each about
    as much as a decoding: reverse is taken for at most `n_latent` outputs, forward for more.

    Parameters
    ----------
    decoder, z, context, memory_mb
        As in `along`.
    outputs
        Names of genes and heads, or weights of the outputs (n_readouts, n_genes + n_heads).

    Returns
    -------
    Tensor
        (n_cells, n_readouts, n_latent).

    Raises
    ------
    DataError
        If a name is no output of the decoder.
    """
    if isinstance(outputs, Tensor):
        readout = outputs
    else:
        readout = torch.zeros(len(outputs), len(decoder.genes) + len(decoder.heads), dtype=z.dtype)
        readout[torch.arange(len(outputs)), decoder.find(tuple(outputs))] = 1.0
    if len(readout) <= decoder.n_latent:
        return gradients_of(decoder, z, context, readout, memory_mb=memory_mb)
    columns, weights = _used(readout)
    size = cells_in(memory_mb, 4 * (len(decoder.genes) + len(decoder.heads)) * decoder.n_latent * TANGENT_COPIES)
    parts = []
    with torch.no_grad():
        for rows in chunks(len(z), size):
            inside = take(context, rows)
            change = tangents(partial(_some_outputs, decoder, inside, columns), z[rows])
            parts.append(torch.einsum("kno,ro->nrk", change, weights))
    return torch.cat(parts)


def _some_outputs(decoder: Decoder, context: Context, columns: list[int], z: Tensor) -> Tensor:
    return decoder.outputs(z, context, columns)


def _used(readout: Tensor) -> tuple[list[int], Tensor]:
    """The outputs that readouts weigh, and their weights (n_readouts, n_used)."""
    used = torch.nonzero(readout.any(dim=0)).ravel()
    return used.tolist(), readout[:, used]


def gradients_of(
    decoder: Decoder, z: Tensor, context: Context, readout: Tensor, *, memory_mb: float = MEMORY_MB
) -> Tensor:
    """Gradients of linear readouts of the outputs, by reverse mode.

    Parameters
    ----------
    decoder, z, context, memory_mb
        As in `along`.
    readout
        Weights of the outputs (n_readouts, n_genes + n_heads), or one readout (n_genes + n_heads,).

    Returns
    -------
    Tensor
        (n_cells, n_readouts, n_latent), or (n_cells, n_latent) for one readout; cost: about two decodings each.
    """
    single = readout.ndim == 1
    columns, weights = _used(readout[None] if single else readout)
    parts = []
    for rows in chunks(len(z), cells_in(memory_mb, 4 * readout.shape[-1])):
        inside = z[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            values = decoder.outputs(inside, take(context, rows), columns) @ weights.T
            # rows are independent, so the gradient of the sum over cells holds the gradient of each cell
            each = [
                torch.autograd.grad(values[:, k].sum(), inside, retain_graph=k + 1 < len(weights))[0]
                for k in range(len(weights))
            ]
        parts.append(torch.stack(each, dim=1))
    result = torch.cat(parts)
    return result[:, 0] if single else result


def jacobians(
    decoder: Decoder,
    z: Tensor,
    context: Context,
    *,
    direction: Tensor | None = None,
    logits: bool = False,
    memory_mb: float = MEMORY_MB,
) -> Iterator[CellJacobian]:
    """Full Jacobians of the expression, chunk by chunk of cells.

    Parameters
    ----------
    decoder, z, context
        As in `along`.
    direction
        Project onto this direction of each cell, too (n_cells, n_latent).
    logits
        Derivatives of what stands before the link, which softmax does not couple. Needs a last linear layer.
    memory_mb
        Budget of a chunk's Jacobian.

    Yields
    ------
    CellJacobian
        Chunks in the order of cells.

    Raises
    ------
    ValueError
        If logits are asked for of a decoder without a last linear layer.
    """
    last = decoder.last_layer()
    if logits and last is None:
        raise ValueError("logits need a decoder that ends in a linear layer; leave `logits` off")
    copies = 1 if last is not None else TANGENT_COPIES
    size = cells_in(memory_mb, 4 * len(decoder.genes) * decoder.n_latent * copies)
    with torch.no_grad():
        for rows in chunks(len(z), size):
            inside, toward = take(context, rows), None if direction is None else direction[rows]
            if last is None:
                yield _by_tangents(decoder, rows, z[rows], inside, toward)
            else:
                yield _by_products(decoder, last, rows, z[rows], inside, toward, logits=logits)


def _by_tangents(decoder: Decoder, rows: slice, z: Tensor, context: Context, direction: Tensor | None) -> CellJacobian:
    """Jacobian of any decoder, by forward mode along every latent."""
    values = tangents(lambda x: decoder.decode(x, context).expression, z).permute(2, 1, 0)
    projected = None if direction is None else torch.einsum("gnk,nk->gn", values, direction)
    return CellJacobian(rows, values, torch.ones_like(values[:, :, 0]), projected)


def _by_products(
    decoder: Decoder,
    last: LastLayer,
    rows: slice,
    z: Tensor,
    context: Context,
    direction: Tensor | None,
    *,
    logits: bool,
) -> CellJacobian:
    """Jacobian through the last linear layer."""
    hidden = decoder.hidden(z, context)
    inner = tangents(lambda x: decoder.hidden(x, context), z).permute(2, 1, 0).contiguous()  # hidden, cells, latents
    weight = last.weight
    activation = F.linear(hidden, weight, last.bias)
    if last.link == "softmax" and not logits:
        share = torch.softmax(activation, dim=1)
        # subtracting the share-weighted mean row inside the product saves a pass over the large array
        mean = torch.einsum("nh,hnk->nk", share @ weight, inner)
        weight = torch.cat([weight, -torch.ones_like(weight[:, :1])], dim=1)
        inner = torch.cat([inner, mean[None]])
        slope = last.scale * share
    else:
        slope = last.scale * _slope(activation, "identity" if logits else last.link)
    values = (weight @ inner.reshape(len(inner), -1)).view(len(weight), *z.shape)
    projected = None if direction is None else weight @ torch.einsum("hnk,nk->hn", inner, direction)
    return CellJacobian(rows, values, slope.T, projected)


def _slope(activation: Tensor, link: str) -> Tensor:
    if link == "softplus":
        return torch.sigmoid(activation)
    return activation.exp() if link == "exp" else torch.ones_like(activation)


def tangents(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Derivatives along every latent of a function that acts on cells one by one (n_latent, n_cells, n_outputs)."""
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return vmap(lambda e: jvp(function, (z,), (e.expand_as(z),))[1])(basis)


def cells_in(memory_mb: float, bytes_per_cell: float) -> int:
    """How many cells fit a budget, at least one."""
    return max(1, int(memory_mb * 2**20 / max(bytes_per_cell, 1)))
