"""A scVI decoder with the weights of the batches at hand only.

The published models have some 11,000 batches, whose one-hot vectors enter every layer: for each latent of each cell a
derivative would multiply them by weights that are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbed.decoders.base import Context, Decoded, Decoder, LastLayer
from perturbed.decoders.scvi import SCVIDecoder
from perturbed.errors import DataError, suggest


class CompactDecoder(Decoder):
    """The decoder part of a SCVI model for some of its batches; equal to the model's up to rounding.

    Parameters
    ----------
    decoder
        The model's decoder.
    batches
        Batches to keep, in any order.

    Raises
    ------
    DataError
        If a batch was not in the model's training.
    """

    def __init__(self, decoder: SCVIDecoder, batches: Sequence[str]) -> None:
        self.genes, self.n_latent = decoder.genes, decoder.n_latent
        self.batches = tuple(sorted(set(batches)))
        place = decoder.context(self.batches)["batch"][:, 0]
        last = decoder.last_layer()
        self._last = last
        self._embedded = decoder.module.batch_representation == "embedding"
        self._layers = decoder.module.decoder.px_decoder
        if self._embedded:
            self._batch = decoder.module.compute_embedding("batch", place[:, None])
        elif len(decoder.batches) > 1:
            self._layers = _keep_columns(self._layers, place, len(decoder.batches))

    def context(self, batch: Sequence[str]) -> dict[str, Tensor]:
        """Context of cells from the names of their batches.

        Raises
        ------
        DataError
            If a batch is not among those kept.
        """
        place = {name: i for i, name in enumerate(self.batches)}
        for name in batch:
            if name not in place:
                raise DataError(f"batch {name!r} is not among those kept; {suggest(name, place)}")
        return {"batch": torch.tensor([place[name] for name in batch], dtype=torch.long)[:, None]}

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        """Activations before the last linear layer."""
        if self._embedded:
            return self._layers(torch.cat([z, self._batch[context["batch"][:, 0]]], dim=-1))
        return self._layers(z, context["batch"])

    def last_layer(self) -> LastLayer:
        """The last linear layer before softmax or softplus."""
        return self._last

    def decode(self, z: Tensor, context: Context) -> Decoded:
        """Expected share of counts; the context holds `batch` (n_cells, 1)."""
        link = F.softplus if self._last.link == "softplus" else lambda a: torch.softmax(a, dim=1)
        return Decoded(link(F.linear(self.hidden(z, context), self._last.weight, self._last.bias)), z[:, :0])

    def outputs(self, z: Tensor, context: Context, columns: Sequence[int] | None = None) -> Tensor:
        """Expression, or some columns of it."""
        expression = self.decode(z, context).expression
        return expression if columns is None else expression[:, list(columns)]


def _keep_columns(layers: Any, place: Tensor, n_batches: int) -> Any:
    """Layers whose one-hot inputs are the batches `place` only; a second one stays, because one alone has no input."""
    kept = place if len(place) > 1 else torch.cat([place, (place + 1) % n_batches])
    few = deepcopy(layers)
    for i, block in enumerate(few.fc_layers):
        if not few.inject_into_layer(i):
            continue
        linear = block[0]
        own = linear.in_features - n_batches
        linear.weight = torch.nn.Parameter(
            torch.cat([linear.weight[:, :own], linear.weight[:, own + kept]], dim=1), requires_grad=False
        )
        linear.in_features = own + len(kept)
    few.n_cat_list = [len(kept)]
    return few
