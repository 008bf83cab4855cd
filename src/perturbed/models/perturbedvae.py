"""PerturbedVAE: separate what a perturbation changes from what it leaves alone, and let a causal model change it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbed.checkpoints import fingerprint
from perturbed.config import Section
from perturbed.data.streaming import take_rows
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, TrainingData, require_seen
from perturbed.models.cells import PairedCells, batch_by_blocks, normalising_factor
from perturbed.models.from_control import CHUNK, FromControl
from perturbed.models.nn.schedules import warm_up_linearly
from perturbed.models.perturbedvae_module import Draws, LossTerms, PerturbedVAEModule
from perturbed.models.perturbedvae_params import PerturbedVAEParams
from perturbed.training import Random, Task, dense_rows, seeded_weights, train

__all__ = ["PerturbedVAE", "PerturbedVAEParams"]

MMD_BLOCK = 32
"""Cells of one condition that stand together in a batch when the MMD compares them (the discrepancy-VAE's batch)."""


class PerturbedVAE(FromControl):
    """PerturbedVAE (Jiang et al. 2026).

    z_ι is encoded from the cell alone, z_ν from cell and condition; a linear-Gaussian SCM whose mechanisms depend on
    the condition is the prior of z_ν, and the decoder sees (z_ν, z_ι) only. Unseen combinations are predicted with z_ι
    of control cells and z_ν from the SCM under the combination's multi-hot condition.
    """

    Params = PerturbedVAEParams
    title = "PerturbedVAE"
    streams = True
    params: PerturbedVAEParams
    module: PerturbedVAEModule

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        if self.params.mmd_weight and self.params.likelihood == "nb":
            raise MethodError("mmd_weight: the MMD compares log-normalised cells; use `likelihood: gaussian`, or 0")
        self.needs_counts = self.params.likelihood == "nb"  # type: ignore[misc]
        self.parallel = not self.params.mmd_weight  # type: ignore[misc]  # the MMD compares the cells of a whole batch

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
        counts, partners = self.needs_counts, self.params.partners
        cells = PairedCells(data, self._perturbed, self._contexts, run.device, counts=counts, partners=partners)
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
            partial(batch_by_blocks, cells.condition, MMD_BLOCK) if self.params.mmd_weight else cells.batches(),
            self.parallel,
        )
        train(task, self.params, run)
        self.module.eval()
        self.module.to("cpu")
        counts_of = None if cells.counts is None else (cells.counts, cells.size)
        pools = cells.control_pools()
        self._control = self._encode_control(data.X, pools, Random.seeded(run.seed, 3), counts_of)

    def _step(self, cells: PairedCells, rows: np.ndarray, random: Random, epoch: int | None) -> LossTerms:
        p = self.params
        weight = 1.0 if epoch is None else warm_up_linearly(epoch, p.warm_up_epochs, p.warm_up_delay)
        draw = {"generator": random.torch, "device": random.torch.device}
        nu = torch.randn(len(rows), p.n_nu, **draw)  # type: ignore[call-overload]
        iota = torch.randn(len(rows), p.n_iota, **draw)  # type: ignore[call-overload]
        prior = partner = None
        if p.mmd_weight:
            prior, partner = torch.randn(nu.shape, **draw), torch.randn(iota.shape, **draw)  # type: ignore[call-overload]
        own = random.share(len(rows))
        return self.module.loss(
            cells.batch(rows, random.numpy, own),
            Draws(nu[own], iota[own], prior, partner),
            kl_weight_nu=weight * p.kl_weight_nu,
            kl_weight_iota=weight * p.kl_weight_iota,
            alpha=weight * p.alpha,
            edge_penalty=p.edge_penalty,
            mmd_weight=p.mmd_weight,
            mmd_width=p.mmd_width,
        )

    def _start_at_mean(self, cells: PairedCells) -> None:
        train_rows = np.flatnonzero(~cells.data.is_val)
        centre = np.asarray(take_rows(cells.data.X, train_rows).mean(axis=0), dtype=np.float64).ravel()
        output = centre
        if cells.counts is not None:
            total = np.asarray(take_rows(cells.counts, train_rows).sum(axis=0), dtype=np.float64).ravel()
            output = np.log((total + 0.5) / (total + 0.5).sum())  # a gene never counted still has a finite share
        self.module.start_at(*(torch.from_numpy(v.astype(np.float32)) for v in (centre, output)))

    @torch.no_grad()
    def _encode_control(
        self,
        X: sparse.csr_matrix,
        pools: list[np.ndarray],
        random: Random,
        counts: tuple[sparse.csr_matrix, np.ndarray] | None = None,
    ) -> dict[str, Tensor]:
        """Background posterior of up to `n_control` of each context's control cells, and the contexts' control means.

        `counts` are the counts and their sum for each cell, where the likelihood is one of counts.
        """
        means = [np.asarray(X[pool].mean(axis=0), dtype=np.float64).ravel() for pool in pools]
        if counts is not None:  # a cell without counts has no depth to predict at
            pools = [pool[np.diff(counts[0][pool].indptr) > 0] for pool in pools]
        rows = [random.numpy.permutation(pool)[: self.params.n_control] for pool in pools]
        chosen = np.concatenate(rows)
        mean, variance = self._background(X[chosen])
        kept = {
            "mean": mean,
            "sd": variance.sqrt(),
            "context": torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in rows])),
            "expression": torch.from_numpy(np.stack(means)),
        }
        if counts is not None:
            size = counts[1][chosen]
            kept["size"] = torch.from_numpy(size)
            kept["scale"] = torch.from_numpy(normalising_factor(X[chosen], size))
        return kept

    # --- latents ----------------------------------------------------------------------------------------------------

    def _encode(self, X: sparse.csr_matrix) -> Tensor:
        """`h = f(x)` of cells, a chunk at a time (n_cells, n_hidden)."""
        parts = np.array_split(np.arange(X.shape[0]), max(1, X.shape[0] // CHUNK))
        return torch.cat([self.module.encoder(dense_rows(X, part)) for part in parts])

    def _background(self, X: sparse.csr_matrix) -> tuple[Tensor, Tensor]:
        return self.module.encode_background(self._encode(X))

    @torch.no_grad()
    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Output `h` of the shared encoder, which never sees the condition, float32 (n_cells, n_hidden).

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).
        """
        return self._encode(X).numpy()

    @torch.no_grad()
    def encode_background(self, X: sparse.csr_matrix) -> np.ndarray:
        """Posterior mean of z_ι given the cell alone, float32 (n_cells, n_iota); `X` as in `represent`."""
        return self._background(X)[0].numpy()

    @torch.no_grad()
    def encode_response(self, X: sparse.csr_matrix, perturbation: np.ndarray) -> np.ndarray:
        """Posterior mean of z_ν given the cell and its condition, float32 (n_cells, n_nu).

        `(I − Λ_νν(u))⁻¹ (E[ε | x, u] + Λ_νι(u) E[z_ι | x] + μ(u))`, which is the mean since the SCM is linear.

        Parameters
        ----------
        X
            As in `represent`.
        perturbation
            Canonical name of each cell's perturbation (n_cells,).

        Raises
        ------
        UnseenPerturbationError
            If a gene was perturbed in no training cell.
        """
        names, condition = np.unique(np.asarray(perturbation, dtype=str), return_inverse=True)
        conditions = torch.cat(
            [self._condition(require_seen(str(name), self._perturbed, "PerturbedVAE")) for name in names]
        )
        mechanisms = self.module.scm(conditions)
        parts = np.array_split(np.arange(X.shape[0]), max(1, X.shape[0] // CHUNK))
        found = []
        for part in parts:
            which = torch.from_numpy(condition[part])
            posterior = self.module.inference(dense_rows(X, part), conditions, which)
            found.append(self.module.scm.respond(mechanisms, which, posterior.iota_mean, posterior.noise_mean))
        return torch.cat(found).numpy()

    def with_controls(
        self, X: sparse.csr_matrix, counts: sparse.csr_matrix | None = None, *, seed: int = 0
    ) -> PerturbedVAE:
        """The same fitted model with other control cells to start predictions from; they belong to its only context.

        Parameters
        ----------
        X
            Log-normalised expression of the control cells, as in `represent`.
        counts
            Their counts on the same genes, for a count likelihood.

        Raises
        ------
        MethodError
            If there are no cells, or counts are needed and not given.
        """
        if not X.shape[0]:
            raise MethodError("control_cells: there are none; give at least one cell")
        if self.needs_counts and counts is None:
            raise MethodError("control_cells: this model has a count likelihood and needs their counts, too")
        of_counts = None
        if self.needs_counts and counts is not None:
            of_counts = counts, np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
        other = copy(self)
        other._contexts = self._contexts[:1]
        other._control = self._encode_control(X, [np.arange(X.shape[0])], Random.seeded(seed, 3), of_counts)
        return other

    # --- predicting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_mean(self, perturbation: str, context: str, *, seed: int = 0) -> np.ndarray:
        """Mean expression under a perturbation, float32 (n_genes,); raises as `predict_one`."""
        genes = self._require(perturbation, context)
        mean = self._mean(genes, context, seed)
        if self.params.anchor:
            real = self._control["expression"][self._contexts.index(context)].numpy()
            mean = mean + real - self._mean((), context, seed)
        return mean.astype(np.float32)

    @torch.no_grad()
    def sample_cells(self, perturbation: str, context: str, n_cells: int, *, seed: int = 0) -> np.ndarray:
        """Generated cells under a perturbation, float32 (n_cells, n_genes); raises as `predict_one`."""
        genes = self._require(perturbation, context)
        return self._generate(genes, context, Random.seeded(seed, 4), n_cells)[0]

    def _decode(self, genes: tuple[str, ...], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: at latent means, or sampled where `random` is given."""
        mechanisms = self.module.scm(self._condition(genes))
        z_iota = self._control["mean"][rows]
        noise = torch.zeros(len(rows), self.params.n_nu)
        if random is not None:
            z_iota = z_iota + self._control["sd"][rows] * torch.randn(z_iota.shape, generator=random.torch)
            noise = torch.exp(0.5 * mechanisms.log_variance) * torch.randn(noise.shape, generator=random.torch)
        which = torch.zeros(len(rows), dtype=torch.long)
        return self.module.generative(mechanisms, which, z_iota, noise).decoded

    @property
    def log_noise(self) -> Tensor | None:
        """Logarithm of each gene's inverse dispersion (counts) or, where it is learned, observation noise."""
        return self.module.log_dispersion

    def _rebuild(self, state: Mapping[str, Tensor]) -> PerturbedVAEModule:
        return PerturbedVAEModule(len(self._genes), len(self._perturbed), self.params)
