"""The project's own VAE as a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
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
