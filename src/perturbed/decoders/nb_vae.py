"""The project's own VAE as a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from perturbed.decoders.base import Context, Decoded, Decoder, Encoded, LastLayer

if TYPE_CHECKING:
    from perturbed.models.nb_vae import NBVAE


class NBVAEDecoder(Decoder):
    """Decoder of a fitted `NBVAE`: expression in units of the cell's mean count (NB) or log-normalised (Gaussian).

    It needs no context. Heads are logits of binary labels, and times in their own unit.

    Parameters
    ----------
    model
        A fitted model.
    """

    def __init__(self, model: NBVAE) -> None:
        self.model = model
        self.module = model.module.eval().requires_grad_(False)
        self.genes = model.genes
        self.heads = tuple(model.params.heads)
        self.n_latent = model.params.n_latent

    def decode(self, z: Tensor, context: Context) -> Decoded:
        """Decode latents."""
        activation, heads = self.module.activations(z)
        return Decoded(self.module.expression(activation), heads)

    def outputs(self, z: Tensor, context: Context, columns: Sequence[int] | None = None) -> Tensor:
        """Expression and heads side by side; of some `columns`, only their rows of the last layer are computed."""
        if columns is None:
            return super().outputs(z, context)
        chosen = torch.as_tensor(list(columns), dtype=torch.long, device=z.device)
        output, n_genes = self.module.output, len(self.genes)
        raw = F.linear(self.module.trunk(z), output.weight[chosen], output.bias[chosen])
        if not self.heads:
            return self.module.expression(raw)
        ones = torch.ones(n_genes, device=z.device)
        scale = torch.cat([ones, self.module.head_scale])[chosen]
        centre = torch.cat([0 * ones, self.module.head_centre])[chosen]
        return torch.where(chosen < n_genes, self.module.expression(raw), raw * scale + centre)

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        """Activations before the last linear layer."""
        return self.module.trunk(z)

    def last_layer(self) -> LastLayer:
        """The last linear layer, genes only."""
        n_genes = len(self.genes)
        output = self.module.output
        link = "softplus" if self.model.params.likelihood == "nb" else "identity"
        return LastLayer(output.weight[:n_genes], output.bias[:n_genes], link)  # type: ignore[arg-type]

    def encode(self, X: sparse.csr_matrix) -> Encoded:
        """Cells in latent space, from log-normalised expression."""
        mean, sd = self.model.encode(X)
        return Encoded(torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(sd.astype(np.float32)), {})
