"""What SAMS-VAE and sVAE+ share: training, prediction from control cells, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perturbed.checkpoints import fingerprint
from perturbed.config import Section
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.cells import PairedCells
from perturbed.models.from_control import CHUNK, FromControl
from perturbed.models.nn.likelihoods import gather_counts
from perturbed.models.nn.schedules import warm_up_linearly
from perturbed.models.sparse_shift_module import LOG_SD_FLOOR, ShiftBatch, SparseShiftModule, SparseShiftTerms
from perturbed.training import Random, Task, dense_rows, seeded_weights, train
from perturbed.training_options import TrainingOptions


class SparseShiftOptions(TrainingOptions):
    """How SAMS-VAE and sVAE+ are trained and predict; the defaults are those published for Norman's cells."""

    lr: float = Field(3e-4, gt=0)
    """Learning rate of Adam (published: 3e-4). Raise it for small data, which give few steps an epoch."""
    batch_size: int = Field(512, ge=1)
    """Cells per step (published: 512). Lower it for small data."""
    epochs: int = Field(10_000, ge=1)
    """Most passes over the training cells; the published limit is `max_steps`."""
    max_steps: int | None = Field(30_000, ge=1)
    """Stop after so many steps (published: 30,000)."""
    warm_up_epochs: int = Field(0, ge=0)
    """Epochs over which both divergences rise to their full weight (published: 0). Meanwhile latents carry an effect at
    no cost and are slow to hand it to the shift; raise it only where all latents collapse."""
    start_from: Literal["prior", "control"] = "prior"
    """Latents that predictions shift: those of the `prior` N(0, I), as published, or the posterior of the context's
    `control` cells, which follows the context; data of several contexts need the latter."""
    n_control: int = Field(2000, ge=1)
    """Control cells kept per context: as starting points of predictions, and for the depth of predicted counts."""
    predict: Literal["sample", "mean"] = "sample"
    """Predicted mean as the average of cells decoded from sampled latents, or decoded from latent means. The decoder is
    trained on samples, and between them it is not quite linear."""
    n_samples: int = Field(200, ge=0)
    """Cells generated per prediction, also used for the variance; 0 gives means only."""


class SparseShiftVAE(FromControl):
    """Base of SAMS-VAE and sVAE+: perturbations add masked shifts to latents that a VAE encodes and decodes."""

    module: SparseShiftModule

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self.needs_counts = self.params.likelihood == "nb"  # type: ignore[misc]

    def check(self, data: TrainingData) -> None:
        """Refuse data the method cannot run on.

        Raises
        ------
        MethodError
            As for every method, and if predictions start from the prior where there are several contexts: all contexts
            would be predicted alike.
        """
        super().check(data)
        contexts = sorted(set(data.context))
        if len(contexts) > 1 and self.params.start_from == "prior":
            raise MethodError(
                f"{self.title} starts from the prior, which knows none of the {len(contexts)} contexts; set "
                "`start_from: control` in method_params"
            )

    @abstractmethod
    def build_module(self, n_genes: int, n_perturbed: int) -> SparseShiftModule:
        """The untrained network."""

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Train, then keep the posterior of the control cells, from which predictions start.

        Raises
        ------
        MethodError
            If no cell is perturbed, a context lacks control cells, or the likelihood needs counts that are not there.
        """
        self.check(data)
        self._genes, self._perturbed = tuple(data.genes), data.seen_genes
        self._contexts = tuple(sorted(set(data.context)))
        if not self._perturbed:
            raise MethodError(f"{self.title} needs perturbed training cells; all cells are control")
        cells = PairedCells(data, self._perturbed, self._contexts, run.device, counts=self.needs_counts)
        with seeded_weights(run.seed):
            self.module = self.build_module(len(data.genes), len(self._perturbed))
        self._start_at_mean(cells)
        self.module.to(run.device)
        train_rows = np.flatnonzero(~data.is_val)
        task = Task(
            self.module,
            lambda rows, random, epoch: self._step(cells, rows, random, epoch, len(train_rows)),
            train_rows,
            np.flatnonzero(data.is_val),
            fingerprint(data, self.params, run.seed),
        )
        train(task, self.params, run)
        self.module.eval()
        self._control = self._encode_control(cells, Random.seeded(run.seed, 3))
        self.module.to("cpu")

    def _step(
        self, cells: PairedCells, rows: np.ndarray, random: Random, epoch: int | None, n_cells: int
    ) -> SparseShiftTerms:
        weight = 1.0 if epoch is None else warm_up_linearly(epoch, self.params.warm_up_epochs)
        return self.module.loss(_batch(cells, rows), random, weight=weight, n_cells=n_cells)

    def _start_at_mean(self, cells: PairedCells) -> None:
        """Start at the training mean and, for the Gaussian, at the training sd."""
        rows = np.flatnonzero(~cells.data.is_val)
        x = cells.data.X[rows]
        centre = np.asarray(x.mean(axis=0), dtype=np.float64).ravel()
        if cells.counts is None:
            square = np.asarray(x.multiply(x).mean(axis=0), dtype=np.float64).ravel()
            sd = np.sqrt(np.maximum(square - centre**2, 0))
            output, noise = centre, np.log(np.maximum(sd, 2 * np.exp(LOG_SD_FLOOR)))
        else:
            total = np.asarray(cells.counts[rows].sum(axis=0), dtype=np.float64).ravel()
            output = np.log((total + 0.5) / (total + 0.5).sum())  # a gene never counted still has a finite share
            noise = np.zeros_like(centre)
        self.module.start_at(*(torch.from_numpy(v.astype(np.float32)) for v in (centre, output, noise)))

    @torch.no_grad()
    def _encode_control(self, cells: PairedCells, random: Random) -> dict[str, Tensor]:
        """Posterior of up to `n_control` control cells per context, encoded without shift."""
        pools = cells.control_pools()
        if cells.counts is not None:  # a cell without counts has no depth to predict at
            pools = [pool[np.diff(cells.counts[pool].indptr) > 0] for pool in pools]
        rows = [random.numpy.permutation(pool)[: self.params.n_control] for pool in pools]
        chosen = np.concatenate(rows)
        mean, variance = self._encode(cells.data.X[chosen])
        kept = {
            "mean": mean,
            "sd": variance.sqrt(),
            "context": torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in rows])),
        }
        if cells.counts is not None:
            kept["size"] = torch.from_numpy(cells.size[chosen])
            kept["scale"] = torch.from_numpy(cells.normalising_factor(chosen))
        return kept

    def _encode(self, X: sparse.csr_matrix) -> tuple[Tensor, Tensor]:
        device = str(next(self.module.parameters()).device)
        parts = np.array_split(np.arange(X.shape[0]), max(1, X.shape[0] // CHUNK))
        encoded = [self.module.encode(dense_rows(X, part, device)) for part in parts]
        return torch.cat([mean for mean, _ in encoded]).cpu(), torch.cat([variance for _, variance in encoded]).cpu()

    @torch.no_grad()
    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Posterior mean of the latents, encoded as if unperturbed (n_cells, n_latent).

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).
        """
        return self._encode(X)[0].numpy()

    def effects(self) -> dict[str, np.ndarray]:
        """`probability` that a gene shifts a latent and the expected `shift`, each (n_perturbed, n_latent)."""
        with torch.no_grad():
            probability = torch.sigmoid(self.module.logit)
            shift = self.module.mean_shift(torch.eye(len(self._perturbed)))
        return {"probability": probability.numpy(), "shift": shift.numpy()}

    # --- prediction -------------------------------------------------------------------------------------------------

    def start(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the unperturbed latents that predictions in place of control cells `rows` start from."""
        mean, sd = self._control["mean"][rows], self._control["sd"][rows]
        return (torch.zeros_like(mean), torch.ones_like(sd)) if self.params.start_from == "prior" else (mean, sd)

    def _decode(self, genes: tuple[str, ...], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: at latent means, or sampled where `random` is given."""
        z, sd = self.start(rows)
        if random is not None:
            z = z + sd * torch.randn(z.shape, generator=random.torch)
            places = [self._perturbed.index(gene) for gene in genes]
            return self.module.decode(z + self.module.draw_shift(places, len(rows), random))
        return self.module.decode(z + self.module.mean_shift(self._condition(genes)))

    @property
    def log_noise(self) -> Tensor:
        """Logarithm of each gene's inverse dispersion (counts) or observation noise (Gaussian)."""
        return self.module.log_noise

    def _rebuild(self, state: Mapping[str, Tensor]) -> SparseShiftModule:
        return self.build_module(len(self._genes), len(self._perturbed))


def _batch(cells: PairedCells, rows: np.ndarray) -> ShiftBatch:
    """The cells `rows`, each paired with its perturbed genes."""
    distinct, condition = np.unique(cells.condition[rows], return_inverse=True)
    conditions = cells.conditions[distinct]
    pair_cell, pair_gene = np.nonzero(conditions[condition])

    def tensor(index: np.ndarray) -> Tensor:
        return torch.from_numpy(index.astype(np.int64)).to(cells.device)

    return ShiftBatch(
        cells.resident.take(rows),
        torch.from_numpy(conditions).to(cells.device),
        tensor(condition),
        tensor(pair_cell),
        tensor(pair_gene),
        None if cells.counts is None else gather_counts(cells.counts, rows, cells.size, cells.device),
    )


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
