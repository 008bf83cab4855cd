"""PerturbedVAE: separate what a perturbation changes from what it leaves alone, and let a causal model change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from perturbed.config import Section
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, Method, TrainingData, require_seen
from perturbed.models.cells import PairedCells
from perturbed.models.nn.likelihoods import nb_log1p_moments
from perturbed.models.nn.schedules import warm_up_linearly
from perturbed.models.perturbedvae_module import Architecture, Draws, LossTerms, PerturbedVAEModule
from perturbed.training import Random, Task, TrainingOptions, dense_rows, fingerprint, seeded_weights, train

CHUNK = 512
"""Cells encoded or decoded at a time."""
MEAN_SAMPLES = 1000
"""At least so many samples are averaged where the mean is one of samples; every control cell counts the same."""
NB_CELLS = 200
"""Control cells behind a predicted mean of counts."""


class PerturbedVAEParams(Architecture, TrainingOptions):
    """Hyper-parameters of PerturbedVAE; the paper's where it names them."""

    alpha: float = Field(0.05, ge=0)
    """Weight of the alignment of z_ι between a perturbed cell and a random control cell (paper: 0.05). 0 for the
    ablation."""
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


class PerturbedVAE(Method):
    """PerturbedVAE (Jiang et al. 2026).

    z_ι is encoded from the cell alone, z_ν from cell and condition; a linear-Gaussian SCM whose mechanisms depend on
    the condition is the prior of z_ν, and the decoder sees (z_ν, z_ι) only. Unseen combinations are predicted with z_ι
    of control cells and z_ν from the SCM under the combination's multi-hot condition.
    """

    Params = PerturbedVAEParams
    stochastic = True
    params: PerturbedVAEParams

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self.needs_counts = self.params.likelihood == "nb"  # type: ignore[misc]
        self.module: PerturbedVAEModule
        self._genes: tuple[str, ...] = ()
        self._perturbed: tuple[str, ...] = ()
        self._contexts: tuple[str, ...] = ()
        self._control: dict[str, Tensor] = {}

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
            raise MethodError("PerturbedVAE needs perturbed training cells; all cells are control")
        cells = PairedCells(data, self._perturbed, self._contexts, run.device, counts=self.needs_counts)
        with seeded_weights(run.seed):
            self.module = PerturbedVAEModule(len(data.genes), len(self._perturbed), self.params)
        if self.params.start_at_mean:
            self._start_at_mean(cells)
        self.module.to(run.device)
        task = Task(
            self.module,
            lambda rows, random, epoch: self._step(cells, rows, random, epoch),
            np.flatnonzero(~data.is_val),
            np.flatnonzero(data.is_val),
            fingerprint(data, self.params, run.seed),
        )
        train(task, self.params, run)
        self.module.eval()
        self._control = self._encode_control(cells, Random.seeded(run.seed, 3))
        self.module.to("cpu")

    def _step(self, cells: PairedCells, rows: np.ndarray, random: Random, epoch: int | None) -> LossTerms:
        p = self.params
        weight = 1.0 if epoch is None else warm_up_linearly(epoch, p.warm_up_epochs)
        draw = {"generator": random.torch, "device": random.torch.device}
        nu = torch.randn(len(rows), p.n_nu, **draw)  # type: ignore[call-overload]
        iota = torch.randn(len(rows), p.n_iota, **draw)  # type: ignore[call-overload]
        return self.module.loss(
            cells.batch(rows, random.numpy),
            Draws(nu, iota),
            kl_weight_nu=weight * p.kl_weight_nu,
            kl_weight_iota=weight * p.kl_weight_iota,
            alpha=weight * p.alpha,
            edge_penalty=p.edge_penalty,
        )

    def _start_at_mean(self, cells: PairedCells) -> None:
        train_rows = np.flatnonzero(~cells.data.is_val)
        centre = np.asarray(cells.data.X[train_rows].mean(axis=0), dtype=np.float64).ravel()
        output = centre
        if cells.counts is not None:
            total = np.asarray(cells.counts[train_rows].sum(axis=0), dtype=np.float64).ravel()
            output = np.log((total + 0.5) / (total + 0.5).sum())  # a gene never counted still has a finite share
        self.module.start_at(*(torch.from_numpy(v.astype(np.float32)) for v in (centre, output)))

    @torch.no_grad()
    def _encode_control(self, cells: PairedCells, random: Random) -> dict[str, Tensor]:
        """Background posterior of up to `n_control` control cells per context, and the contexts' control means."""
        data = cells.data
        pools = cells.control_pools()
        means = [np.asarray(data.X[pool].mean(axis=0), dtype=np.float64).ravel() for pool in pools]
        if cells.counts is not None:  # a cell without counts has no depth to predict at
            pools = [pool[np.diff(cells.counts[pool].indptr) > 0] for pool in pools]
        rows = [random.numpy.permutation(pool)[: self.params.n_control] for pool in pools]
        chosen = np.concatenate(rows)
        device = next(self.module.parameters()).device
        encoded = [
            self.module.encode_background(self.module.encoder(dense_rows(data.X, part, str(device))))
            for part in np.array_split(chosen, max(1, len(chosen) // CHUNK))
        ]
        kept = {
            "mean": torch.cat([mean for mean, _ in encoded]),
            "sd": torch.cat([variance for _, variance in encoded]).sqrt(),
            "context": torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in rows])),
            "expression": torch.from_numpy(np.stack(means)),
        }
        if cells.counts is not None:
            kept["size"] = torch.from_numpy(cells.size[chosen])
            kept["scale"] = torch.from_numpy(cells.normalising_factor(chosen))
        return {key: value.cpu() for key, value in kept.items()}

    # --- predicting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Mean expression, and variance and generated cells where `n_samples` is above 0.

        Raises
        ------
        UnseenPerturbationError
            If a gene was perturbed in no training cell.
        MethodError
            If the context had no control cells in training.
        """
        genes = require_seen(perturbation, self._perturbed, "PerturbedVAE")
        if context not in self._contexts:
            raise MethodError(f"context {context!r} was not in training; known: {', '.join(self._contexts)}")
        result: dict[str, np.ndarray] = {}
        if self.params.n_samples:
            result["cells"], result["variance"] = self._generate(genes, context, Random.seeded(seed, 4))
        result["mean"] = self._mean(genes, context, seed)
        if self.params.anchor:
            real = self._control["expression"][self._contexts.index(context)].numpy()
            result["mean"] = result["mean"] + real - self._mean((), context, seed)
        result["mean"] = result["mean"].astype(np.float32)
        return result

    def _mean(self, genes: tuple[str, ...], context: str, seed: int) -> np.ndarray:
        rows = self._control_of(context)
        if self.params.likelihood == "nb":
            rows = rows[:NB_CELLS]  # the moments of the counts are dear; the order is random
        random = None
        if self.params.predict == "sample":
            random = Random.seeded(seed, 5)
            rows = rows.repeat(-(-MEAN_SAMPLES // len(rows))) if self.params.likelihood == "gaussian" else rows
        parts = rows.split(CHUNK)
        total = sum(self._expect(self._decode(genes, part, random), part)[0].sum(0) for part in parts)
        return np.asarray(total / len(rows))

    def _generate(self, genes: tuple[str, ...], context: str, random: Random) -> tuple[np.ndarray, np.ndarray]:
        pool = self._control_of(context)
        rows = pool[torch.from_numpy(random.numpy.integers(len(pool), size=self.params.n_samples))]
        decoded = self._decode(genes, rows, random)
        mean, variance = self._expect(decoded, rows)
        total_variance = mean.var(axis=0) + variance.mean(axis=0)
        return self._observe(decoded, rows, random).astype(np.float32), total_variance.astype(np.float32)

    def _control_of(self, context: str) -> Tensor:
        return torch.nonzero(self._control["context"] == self._contexts.index(context)).ravel()

    def _decode(self, genes: tuple[str, ...], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: at latent means, or sampled where `random` is given."""
        condition = torch.zeros(1, len(self._perturbed))
        condition[0, [self._perturbed.index(gene) for gene in genes]] = 1
        mechanisms = self.module.scm(condition)
        z_iota = self._control["mean"][rows]
        noise = torch.zeros(len(rows), self.params.n_nu)
        if random is not None:
            z_iota = z_iota + self._control["sd"][rows] * torch.randn(z_iota.shape, generator=random.torch)
            noise = torch.exp(0.5 * mechanisms.log_variance) * torch.randn(noise.shape, generator=random.torch)
        which = torch.zeros(len(rows), dtype=torch.long)
        return self.module.generative(mechanisms, which, z_iota, noise).decoded

    def _expect(self, decoded: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the observation, on the scale of log-normalised expression, given decoded latents."""
        log_dispersion = self.module.log_dispersion
        if self.params.likelihood == "nb":
            assert log_dispersion is not None
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            return nb_log1p_moments(mean, log_dispersion.double().exp().numpy(), self._control["scale"][rows].numpy())
        value = decoded.double().numpy()
        noise = 0.0 if log_dispersion is None else log_dispersion.double().mul(2).exp().numpy()
        return value, np.broadcast_to(noise, value.shape)

    def _observe(self, decoded: Tensor, rows: Tensor, random: Random) -> np.ndarray:
        """Draw observations given decoded latents."""
        log_dispersion = self.module.log_dispersion
        if self.params.likelihood == "nb":
            assert log_dispersion is not None
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            theta = log_dispersion.double().exp().numpy()
            counts = random.numpy.poisson(random.numpy.gamma(theta, mean / theta))
            return np.log1p(counts * self._control["scale"][rows, None].numpy())
        if log_dispersion is None:
            return decoded.numpy()
        return (decoded + log_dispersion.exp() * torch.randn(decoded.shape, generator=random.torch)).numpy()

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
        self.module = PerturbedVAEModule(len(self._genes), len(self._perturbed), self.params)
        self.module.load_state_dict(_strip(state, "module."))
        self.module.eval()
        self._control = _strip(state, "control.")


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
