"""What SAMS-VAE and sVAE+ share: training, prediction from control cells, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perturbed.config import Section
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, Method, TrainingData, require_seen
from perturbed.models.cells import PairedCells
from perturbed.models.nn.likelihoods import gather_counts, nb_log1p_moments
from perturbed.models.nn.schedules import warm_up_linearly
from perturbed.models.sparse_shift_module import LOG_SD_FLOOR, ShiftBatch, SparseShiftModule, SparseShiftTerms
from perturbed.training import Random, Task, TrainingOptions, dense_rows, fingerprint, seeded_weights, train

CHUNK = 512
"""Cells encoded or decoded at a time."""
MEAN_SAMPLES = 1000
"""At least so many samples are averaged where the mean is one of samples; every control cell counts the same."""
NB_CELLS = 200
"""Control cells behind a predicted mean of counts."""


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


class SparseShiftVAE(Method):
    """Base of SAMS-VAE and sVAE+: perturbations add masked shifts to latents that a VAE encodes and decodes."""

    stochastic = True
    params: Any
    title: ClassVar[str]
    """Name in error messages."""

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self.needs_counts = self.params.likelihood == "nb"  # type: ignore[misc]
        self.module: SparseShiftModule
        self._genes: tuple[str, ...] = ()
        self._perturbed: tuple[str, ...] = ()
        self._contexts: tuple[str, ...] = ()
        self._control: dict[str, Tensor] = {}

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

    @torch.no_grad()
    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Predict by decoding the starting latents of the context plus the sum of the genes' shifts.

        Raises
        ------
        MethodError
            If the context had no control cells in training.
        UnseenPerturbationError
            If a gene was never perturbed in training.
        """
        if context not in self._contexts:
            known = ", ".join(self._contexts)
            raise MethodError(f"context {context!r} has no control cells in training; known: {known}")
        genes = [self._perturbed.index(gene) for gene in require_seen(perturbation, self._perturbed, self.title)]
        pool = torch.nonzero(self._control["context"] == self._contexts.index(context)).ravel()
        result: dict[str, np.ndarray] = {"mean": self._mean(genes, pool, seed)}
        if self.params.n_samples:
            random = Random.seeded(seed, 4)
            rows = pool[torch.from_numpy(random.numpy.integers(len(pool), size=self.params.n_samples))]
            decoded = self._decode(genes, rows, random)
            mean, variance = self._expect(decoded, rows)
            result["cells"] = self._observe(decoded, rows, random).astype(np.float32)
            result["variance"] = (mean.var(axis=0) + variance.mean(axis=0)).astype(np.float32)
        return result

    def _mean(self, genes: list[int], rows: Tensor, seed: int) -> np.ndarray:
        gaussian = self.params.likelihood == "gaussian"
        if not gaussian:
            rows = rows[:NB_CELLS]  # the moments of the counts are dear; the order is random
        random = None
        if self.params.predict == "sample":
            random = Random.seeded(seed, 5)
            rows = rows.repeat(-(-MEAN_SAMPLES // len(rows))) if gaussian else rows
        parts = rows.split(CHUNK)
        total = sum(self._expect(self._decode(genes, part, random), part)[0].sum(0) for part in parts)
        return np.asarray(total / len(rows), dtype=np.float32)

    def start(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the unperturbed latents that predictions in place of control cells `rows` start from."""
        mean, sd = self._control["mean"][rows], self._control["sd"][rows]
        return (torch.zeros_like(mean), torch.ones_like(sd)) if self.params.start_from == "prior" else (mean, sd)

    def _decode(self, genes: list[int], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: at latent means, or sampled where `random` is given."""
        z, sd = self.start(rows)
        if random is not None:
            z = z + sd * torch.randn(z.shape, generator=random.torch)
            return self.module.decode(z + self.module.draw_shift(genes, len(rows), random))
        condition = torch.zeros(1, len(self._perturbed))
        condition[0, genes] = 1
        return self.module.decode(z + self.module.mean_shift(condition))

    def _expect(self, decoded: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the observation, on the scale of log-normalised expression, given decoded latents."""
        noise = self.module.log_noise.double()
        if self.params.likelihood == "nb":
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            return nb_log1p_moments(mean, noise.exp().numpy(), self._control["scale"][rows].numpy())
        value = decoded.double().numpy()
        return value, np.broadcast_to(noise.mul(2).exp().numpy(), value.shape)

    def _observe(self, decoded: Tensor, rows: Tensor, random: Random) -> np.ndarray:
        """Draw observations given decoded latents."""
        if self.params.likelihood == "nb":
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            theta = self.module.log_noise.double().exp().numpy()
            counts = random.numpy.poisson(random.numpy.gamma(theta, mean / theta))
            return np.log1p(counts * self._control["scale"][rows, None].numpy())
        noise = torch.randn(decoded.shape, generator=random.torch)
        return (decoded + self.module.log_noise.exp() * noise).numpy()

    # --- keeping ----------------------------------------------------------------------------------------------------

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    def state(self) -> dict[str, Tensor]:
        """Weights, and the posterior of the control cells."""
        weights = {f"module.{key}": value for key, value in self.module.state_dict().items()}
        return weights | {f"control.{key}": value for key, value in self._control.items()}

    def meta(self) -> dict[str, Any]:
        """Names of genes, perturbed genes and contexts."""
        return {"genes": self._genes, "perturbed": self._perturbed, "contexts": self._contexts}

    def load_state(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        self._genes, self._perturbed = tuple(meta["genes"]), tuple(meta["perturbed"])
        self._contexts = tuple(meta["contexts"])
        self.module = self.build_module(len(self._genes), len(self._perturbed))
        self.module.load_state_dict(_strip(state, "module."))
        self.module.eval()
        self._control = _strip(state, "control.")


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
