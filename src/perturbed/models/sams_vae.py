"""SAMS-VAE: perturbations add sparse shifts to the latents of a basal cell (Bereket and Karaletsos 2023)."""

from __future__ import annotations

from perturbed.models.sparse_shift import SparseShiftOptions, SparseShiftVAE
from perturbed.models.sparse_shift_module import SAMSArchitecture, SAMSModule


class SAMSVAEParams(SAMSArchitecture, SparseShiftOptions):
    """Hyper-parameters of SAMS-VAE; the published ones where they are known."""


class SAMSVAE(SparseShiftVAE):
    """Sparse additive mechanism shift VAE.

    `z = z_basal + Σ_t m_t ⊙ e_t` over the perturbed genes t of a cell, `x ~ p(x | z)`. A combination is predicted by
    decoding basal latents, drawn from their prior as published or from the posterior of control cells, plus the sum of
    its genes' shifts.
    """

    Params = SAMSVAEParams
    params: SAMSVAEParams
    title = "SAMS-VAE"

    def build_module(self, n_genes: int, n_perturbed: int) -> SAMSModule:
        """The untrained network."""
        return SAMSModule(n_genes, n_perturbed, self.params)
