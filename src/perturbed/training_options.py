"""How a torch model is trained: the options that every method's parameters share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perturbed.config import Section


class TrainingOptions(Section):
    """How a torch model is trained."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate of Adam. Raise it for small data, which give few steps an epoch."""
    lr_final: float = Field(1.0, ge=0, le=1)
    """Share of `lr` left in the last epoch; it falls linearly. 1 keeps it constant; a small one averages out the
    noise of the last steps, which is what a high `lr` on small data needs."""
    batch_size: int = Field(64, ge=1)
    """Cells per step. Larger batches train faster per cell, in fewer steps."""
    epochs: int = Field(100, ge=1)
    """Most passes over the training cells."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, whatever the epochs; for data so large that one pass is much."""
    patience: int | None = Field(None, ge=1)
    """Stop when the validation loss has not fallen for so many epochs, and keep the best weights. Leave out to train
    all epochs and keep the last weights; without validation cells it has no effect."""
    min_epochs: int = Field(0, ge=0)
    """Epochs before which `patience` stops nothing."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of all weights; raise it where the model overfits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` multiplies matrices in bfloat16 (autocast) and keeps weights, KL terms, solves and likelihoods in
    float32: about twice as fast on GPUs since Ampere and on CPUs that have it in hardware, slower on others."""
    compile: bool = False
    """Compile the layers (`torch.compile`): half a minute before the first step, less time for each. Needs a C++
    compiler, and on GPUs Triton; results agree with the uncompiled ones up to rounding."""
