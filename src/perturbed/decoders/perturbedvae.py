"""PerturbedVAE as a decoder: z holds the response and the background side by side, z = (z_ν, z_ι)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbed.decoders.base import Context, Decoded, Decoder, Encoded, LastLayer
from perturbed.training import dense_rows

if TYPE_CHECKING:
    from perturbed.models.perturbedvae import PerturbedVAE

CHUNK = 2048
"""Cells encoded at a time."""


class PerturbedVAEDecoder(Decoder):
    """Decoder of a fitted `PerturbedVAE`: log-normalised expression (Gaussian) or the share of counts (NB).

    The decoder never sees the condition, so it needs no context.

    Parameters
    ----------
    model
        A fitted model.
    """

    def __init__(self, model: PerturbedVAE) -> None:
        self.module = model.module.eval().requires_grad_(False)
        self.genes = model.genes
        self.n_nu, self.n_iota = model.params.n_nu, model.params.n_iota
        self.n_latent = self.n_nu + self.n_iota
        self.n_perturbed = len(model.meta()["perturbed"])
        self.is_gaussian = model.params.likelihood == "gaussian"

    def decode(self, z: Tensor, context: Context) -> Decoded:
        """Decode latents."""
        out = self.module.decode(z[:, : self.n_nu], z[:, self.n_nu :])
        return Decoded(out if self.is_gaussian else out.exp(), z[:, :0])

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        """Activations before the last linear layer."""
        return self.module.decoder[:-1](z)

    def last_layer(self) -> LastLayer:
        """The last linear layer, before softmax for counts."""
        last = self.module.decoder[-1]
        assert isinstance(last, torch.nn.Linear)
        return LastLayer(last.weight, last.bias, "identity" if self.is_gaussian else "softmax")

    @torch.no_grad()
    def encode(self, X: sparse.csr_matrix) -> Encoded:
        """Cells without perturbation (u = 0): background from the cell, response from the control's mechanisms.

        Parameters
        ----------
        X
            Log-normalised expression, CSR (n_cells, n_genes).
        """
        no_perturbation = torch.zeros(1, self.n_perturbed)
        mean, sd = [], []
        for start in range(0, X.shape[0], CHUNK):
            x = dense_rows(X, np.arange(start, min(X.shape[0], start + CHUNK)))
            which = torch.zeros(len(x), dtype=torch.long)
            posterior = self.module.inference(x, no_perturbation, which)
            mechanisms = self.module.scm(no_perturbation)
            z_nu = self.module.scm.respond(mechanisms, which, posterior.iota_mean, posterior.noise_mean)
            mean.append(torch.cat([z_nu, posterior.iota_mean], dim=1))
            sd.append(torch.cat([posterior.noise_variance, posterior.iota_variance], dim=1).sqrt())
        return Encoded(torch.cat(mean), torch.cat(sd), {})
