"""The discrepancy-VAE: control cells, intervened on in a causal latent space, must look like perturbed cells."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perturbed.checkpoints import fingerprint
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.cells import PairedCells
from perturbed.models.discrepancy_vae_module import (
    DiscrepancyVAEModule,
    LossTerms,
    Weights,
    condition_batches,
    kl_weight,
    mmd_weight,
    target_temperature,
)
from perturbed.models.from_control import CHUNK, FromControl
from perturbed.models.nn.mmd import multiscale_bandwidths
from perturbed.names import CONTROL
from perturbed.training import Random, Task, dense_rows, seeded_weights, train
from perturbed.training_options import TrainingOptions


class DiscrepancyVAEParams(TrainingOptions):
    """Hyper-parameters of the discrepancy-VAE; the published ones."""

    n_latent: int | None = Field(105, ge=2)
    """Latents. None for one per perturbed gene, the published rule, which gives 105 on Norman."""
    n_hidden: int = Field(128, ge=1)
    """Width of the hidden layer of encoder, targets and decoder."""
    mmd_weight: float = Field(10.0, ge=0)
    """Weight α of the discrepancy, reached in mid-training. Raise it where predictions hardly leave control."""
    kl_weight: float = Field(2.0, ge=0)
    """Weight β of the KL, reached in the last epoch."""
    temperature: float = Field(5.0, gt=0)
    """Temperature of the targets in the last epoch; it rises from 1. A larger one makes each gene act on one latent."""
    predict_temperature: float | None = Field(None, gt=0)
    """Temperature of predictions; None takes the last of training. The published evaluation of singles took 1."""
    edge_penalty: float = Field(1e-3, ge=0)
    """Weight of the L1 norm of the graph."""
    mmd_width: float = Field(1000.0, gt=0)
    """Middle width of the ten Gaussian kernels of the discrepancy, each twice as wide as the one before, on the
    scale of squared distances between cells. Scale it with the number of genes."""
    n_control: int = Field(2000, ge=1)
    """Control cells kept per context as starting points of predictions."""
    predict: Literal["sample", "mean"] = "sample"
    """Predicted mean as the average of cells decoded from sampled latents, as published, or from latent means."""
    n_samples: int = Field(200, ge=0)
    """Cells generated per prediction, also used for the variance; 0 gives means only."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of Adam."""
    batch_size: int = Field(32, ge=2)
    """Cells of a batch, all of one condition."""


class DiscrepancyVAE(FromControl):
    """Discrepancy-VAE (Zhang et al. 2023), any number of simultaneous perturbations."""

    Params = DiscrepancyVAEParams
    title = "Discrepancy-VAE"
    params: DiscrepancyVAEParams
    module: DiscrepancyVAEModule

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Train on pairs of perturbed cells and random control cells, then keep the posterior of the control cells.

        Raises
        ------
        MethodError
            If no training cell is perturbed, or a context lacks control cells.
        """
        self.check(data)
        self._genes, self._perturbed = tuple(data.genes), data.seen_genes
        self._contexts = tuple(sorted(set(data.context)))
        is_perturbed = np.asarray(data.perturbation != CONTROL)
        if not (is_perturbed & ~data.is_val).any():
            raise MethodError(f"{self.title} needs perturbed training cells; all cells are control")
        cells = PairedCells(data, self._perturbed, self._contexts, run.device)
        mask = self._encoder_mask(data)
        with seeded_weights(run.seed):
            self.module = self._build(mask).to(run.device)
        group = cells.condition * len(self._contexts) + cells.context
        task = Task(
            self.module,
            lambda rows, random, epoch: self._step(cells, rows, random, epoch),
            np.flatnonzero(is_perturbed & ~data.is_val),
            np.flatnonzero(is_perturbed & data.is_val),
            fingerprint(data, self.params, run.seed)
            + ("" if mask is None else f"{zlib.crc32(mask.numpy().tobytes())}"),
            batches=partial(condition_batches, group),
        )
        train(task, self.params, run)
        self.module.eval()
        self._control = self._encode_control(cells, Random.seeded(run.seed, 3))
        self.module.to("cpu")

    def _encoder_mask(self, data: TrainingData) -> Tensor | None:
        """Mask of the encoder's first layer; a hook for subclasses."""
        return None

    def _build(self, mask: Tensor | None) -> DiscrepancyVAEModule:
        n_latent = self.params.n_latent or max(2, len(self._perturbed))
        return DiscrepancyVAEModule(len(self._genes), len(self._perturbed), n_latent, self.params.n_hidden, mask)

    def weights(self, epoch: int | None) -> Weights:
        """Weights of the loss in an epoch, or, for validation (None), those of the end of training."""
        p = self.params
        if epoch is None:
            return Weights(p.mmd_weight, p.kl_weight, p.edge_penalty, p.temperature)
        return Weights(
            mmd_weight(epoch, p.epochs, p.mmd_weight),
            kl_weight(epoch, p.epochs, p.kl_weight),
            p.edge_penalty,
            target_temperature(epoch, p.epochs, p.temperature),
        )

    def _step(self, cells: PairedCells, rows: np.ndarray, random: Random, epoch: int | None) -> LossTerms:
        n_latent = len(self.module.graph)
        noise = torch.randn(len(rows), n_latent, generator=random.torch, device=random.torch.device)
        bandwidths = multiscale_bandwidths(self.params.mmd_width)
        return self.module.loss(cells.batch(rows, random.numpy), noise, self.weights(epoch), bandwidths)

    @torch.no_grad()
    def _encode_control(self, cells: PairedCells, random: Random) -> dict[str, Tensor]:
        """Posterior of the exogenous latents of up to `n_control` control cells per context."""
        rows = [random.numpy.permutation(pool)[: self.params.n_control] for pool in cells.control_pools()]
        mean, variance = self._encode(cells.data.X, np.concatenate(rows))
        context = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        return {"mean": mean, "sd": variance.sqrt(), "context": torch.from_numpy(context)}

    def _encode(self, X: sparse.csr_matrix, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        device = next(self.module.parameters()).device
        parts = np.array_split(rows, max(1, -(-len(rows) // CHUNK)))
        mean, variance = zip(*(self.module.encode(dense_rows(X, part, str(device))) for part in parts))
        return torch.cat(mean).cpu(), torch.cat(variance).cpu()

    # --- predicting -------------------------------------------------------------------------------------------------

    def _decode(self, genes: tuple[str, ...], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: from latent means, or sampled where `random` is given."""
        z = self._control["mean"][rows]
        if random is not None:
            z = z + self._control["sd"][rows] * torch.randn(z.shape, generator=random.torch)
        temperature = self.params.predict_temperature or self.params.temperature
        return self.module.decode(self.module.causal(z + self.module.shift(self._condition(genes), temperature)))

    @torch.no_grad()
    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Posterior mean of the exogenous latents of cells, which never sees a condition (n_cells, n_latent)."""
        return self._encode(X, np.arange(X.shape[0]))[0].numpy()

    # --- keeping ----------------------------------------------------------------------------------------------------

    def _rebuild(self, state: Mapping[str, Tensor]) -> DiscrepancyVAEModule:
        return self._build(state.get("encoder.0.mask"))
