"""Hyper-parameters of PerturbedVAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perturbed.models.partners import Partners
from perturbed.models.perturbedvae_module import Architecture
from perturbed.training_options import TrainingOptions


class PerturbedVAEParams(Architecture, TrainingOptions):
    """Hyper-parameters of PerturbedVAE; the paper's where it names them."""

    alpha: float = Field(0.05, ge=0)
    """Weight of the alignment of z_ι between a perturbed cell and a random control cell (paper: 0.05). 0 for the
    ablation."""
    partners: Partners = "random"
    """Control partners of the alignment. `random` (paper) also penalises what the cells of one condition differ in, by
    2α times the variance of μ_ι; `matched_pca` and `matched_cycle` draw one of the ten control cells nearest in depth
    and in principal components or cell-cycle scores, each centred within its condition."""
    kl_weight_nu: float = Field(1e-2, ge=0)
    """Weight β_ν of the response's KL (paper: 0.01)."""
    kl_weight_iota: float = Field(1e-2, ge=0)
    """Weight β_ι of the background's KL (paper: 0.01)."""
    edge_penalty: float = Field(1e-3, ge=0)
    """Weight of the L1 norm of what a perturbation changes in the SCM's edges. Trained on single perturbations, the
    means cannot tell a changed edge from a changed μ, and the products that only a combination forms (one gene's edges
    times the other's μ) stay as training left them; the penalty prefers μ. The paper names none, its predecessor
    penalises its graph (weight 1e-3 there, too). Scale it with the number of genes under `sum`; 0 leaves it out."""
    warm_up_epochs: int = Field(10, ge=0)
    """Epochs over which the KL weights and α rise linearly."""
    warm_up_delay: int = Field(0, ge=0)
    """Epochs before that, in which those weights are 0 (the predecessor waits 10)."""
    mmd_weight: float = Field(0.0, ge=0)
    """Weight of the MMD between cells generated as in prediction (z_ι of control partners, z_ν from the prior) and the
    observed cells of the same condition; Gaussian likelihood only. 0 leaves it out."""
    mmd_width: float = Field(1000.0, gt=0)
    """Middle width of the MMD's ten kernels, on the scale of squared distances (discrepancy-VAE: 1000)."""
    start_at_mean: bool = True
    """Start with the training mean as the decoder's bias and subtracted from the encoder's input; saves the epochs
    otherwise spent on learning the mean."""
    n_control: int = Field(2000, ge=1)
    """Control cells kept per context as starting points of predictions."""
    predict: Literal["sample", "mean"] = "sample"
    """Predicted mean as the average of cells decoded from sampled latents, as the paper generates them, or from latent
    means. The decoder is trained on samples, and between them it is not quite linear."""
    n_samples: int = Field(200, ge=0)
    """Cells generated per prediction, also used for the variance; 0 gives means only."""
    anchor: bool = False
    """Add to each prediction what the model gets wrong about the control mean. The paper does not."""
