"""The protocol of a trained decoder: everything in `perturbed.gradients` works on any model that keeps it.

A decoder acts on cells one by one: row i of its output depends on row i of `z` and of every tensor in the context only.
Batched derivatives rely on that, and on evaluation mode (no dropout, frozen batch statistics).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbed.errors import DataError, suggest

Link = Literal["identity", "softplus", "exp", "softmax"]
"""What follows the last linear layer. All but `softmax` act gene by gene, so that they scale a gene's gradient and do
not turn it."""

Context = Mapping[str, Tensor]
"""What a decoder needs of each cell beside z, such as batch and library size; every tensor has one row per cell."""


class Decoded(NamedTuple):
    """Output of a decoder."""

    expression: Tensor
    """Mean expression on the decoder's own scale (n_cells, n_genes)."""
    heads: Tensor
    """Auxiliary outputs before their link: logits of labels, times as they are (n_cells, n_heads)."""


class Encoded(NamedTuple):
    """Cells in latent space."""

    mean: Tensor
    """Posterior mean (n_cells, n_latent)."""
    sd: Tensor
    """Posterior standard deviation, same shape."""
    context: dict[str, Tensor]
    """Context of the cells."""


class LastLayer(NamedTuple):
    """The last linear layer and what follows it, for decoders of which `expression = link(weight @ hidden + bias)`."""

    weight: Tensor
    """(n_genes, n_hidden)."""
    bias: Tensor
    """(n_genes,)."""
    link: Link
    scale: float = 1.0
    """Constant factor on the expression."""


class Decoder(ABC):
    """A trained decoder.

    Attributes
    ----------
    genes, heads
        Names of the outputs.
    n_latent
        Dimension of z.
    """

    genes: tuple[str, ...]
    heads: tuple[str, ...] = ()
    n_latent: int

    @abstractmethod
    def decode(self, z: Tensor, context: Context) -> Decoded:
        """Decode latents.

        Parameters
        ----------
        z
            (n_cells, n_latent).
        context
            One row per cell.
        """

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        """Activations before the last linear layer (n_cells, n_hidden); only where `last_layer` is not None."""
        raise NotImplementedError(f"{type(self).__name__} has no last linear layer")

    def last_layer(self) -> LastLayer | None:
        """The last linear layer, if the decoder ends in one; derivatives are then matrix products."""
        return None

    def outputs(self, z: Tensor, context: Context, columns: Sequence[int] | None = None) -> Tensor:
        """Expression and heads side by side (n_cells, n_genes + n_heads), or only some `columns` of them.

        Decoders whose genes do not depend on one another override this, so that few columns cost little.
        """
        decoded = self.decode(z, context)
        everything = torch.cat([decoded.expression, decoded.heads], dim=1) if self.heads else decoded.expression
        return everything if columns is None else everything[:, list(columns)]

    def find(self, names: tuple[str, ...] | list[str]) -> list[int]:
        """Columns of `outputs` of genes and heads by name.

        Raises
        ------
        DataError
            If a name is neither a gene nor a head of the decoder.
        """
        place = {name: i for i, name in enumerate((*self.genes, *self.heads))}
        for name in names:
            if name not in place:
                raise DataError(f"{name!r} is no output of the decoder; {suggest(name, place)}")
        return [place[name] for name in names]


def take(context: Context, rows: slice | Tensor) -> dict[str, Tensor]:
    """The context of some cells."""
    return {key: value[rows] for key, value in context.items()}


def chunks(n_cells: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` cells."""
    for start in range(0, n_cells, max(1, size)):
        yield slice(start, min(n_cells, start + max(1, size)))


def as_latents(z: np.ndarray | Tensor) -> Tensor:
    """Latents as a float32 tensor, with a clear error for a wrong shape."""
    tensor = torch.as_tensor(np.asarray(z), dtype=torch.float32) if not isinstance(z, Tensor) else z.float()
    if tensor.ndim != 2:
        raise DataError(f"latents must be cells × dimensions, got shape {tuple(tensor.shape)}")
    return tensor
