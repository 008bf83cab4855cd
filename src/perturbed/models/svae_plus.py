"""sVAE+: each perturbation moves the prior of few latents (Lopez et al. 2023, after Lachapelle et al. 2022)."""

from __future__ import annotations

from perturbed.models.sparse_shift import SparseShiftOptions, SparseShiftVAE
from perturbed.models.sparse_shift_module import SVAEPlusArchitecture, SVAEPlusModule


class SVAEPlusParams(SVAEPlusArchitecture, SparseShiftOptions):
    """Hyper-parameters of sVAE+; those of its comparison in the SAMS-VAE paper where they are known."""


class SVAEPlus(SparseShiftVAE):
    """Sparse VAE+ with a spike-and-slab prior on mechanism shifts.

    `z | u ~ N(Σ_t m_t ⊙ μ_t, I)`, `x ~ p(x | z)`, and q(z | x) never sees the condition. The published model knows
    single labels only; that the shifts of a combination add up is inferred.
    """

    Params = SVAEPlusParams
    params: SVAEPlusParams
    title = "sVAE+"

    def build_module(self, n_genes: int, n_perturbed: int) -> SVAEPlusModule:
        """The untrained network."""
        return SVAEPlusModule(n_genes, n_perturbed, self.params)
