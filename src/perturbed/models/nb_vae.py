"""The VAE of the decoder arm: trained without labels (or with a few), then asked what it knows of perturbations.

As a method of the benchmark it predicts a perturbation by following its decoder's gradient of the perturbed genes: no
perturbation label enters its training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perturbed.checkpoints import fingerprint
from perturbed.config import Section
from perturbed.errors import DataError, MethodError, UnseenPerturbationError, suggest
from perturbed.files import sha256_text
from perturbed.models.base import FitRun, Method, TrainingData
from perturbed.models.nb_vae_module import Architecture, Batch, HeadKind, LossTerms, NBVAEModule
from perturbed.models.nn.likelihoods import gather_counts
from perturbed.names import CONTROL, genes_of
from perturbed.training import Random, Task, dense_rows, seeded_weights, train
from perturbed.training_options import TrainingOptions

CHUNK = 2048


class Head(Section):
    """A further output of the decoder, learned from labels of some cells."""

    column: str
    """Column of the cells (`keys.keep` of the card), or `perturbation`."""
    kind: HeadKind = "binary"
    """`binary`: cross-entropy on a logit. `continuous`: absolute error, for times and ordinal values."""
    positive: tuple[str, ...] = ()
    """Binary only: the values of the column that count as 1; all others are 0."""
    unknown: tuple[str, ...] = ()
    """Values that mean no label."""
    labelled_fraction: float = Field(1.0, gt=0, le=1)
    """Share of training cells whose label is used; the others train unlabelled."""
    mask: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Cells whose label is never used: column to values, such as `{cell_type: [B cells]}`."""
    weight: float = Field(1000.0, ge=0)
    """Weight of the error beside the log-likelihood, which is a sum over genes."""


class NBVAEParams(Architecture, TrainingOptions):
    """Hyper-parameters of the VAE; the paper's where it names them."""

    kl_weight: float = Field(10.0, ge=0)
    """β of the KL, after warm-up (paper: 50 for Irf8 in two dimensions, 1 in 32, 10 elsewhere)."""
    warm_up_epochs: int = Field(10, ge=0)
    """Epochs over which β rises as (e^{t/T} − 1) / (e − 1)."""
    heads: dict[str, Head] = Field(default_factory=dict)
    """Heads by name."""
    start_at_mean: bool = True
    """Start with the mean expression as the output's bias."""
    n_steps: int = Field(20, ge=1)
    """Steps along the gradient when it predicts a perturbation."""
    direction: Literal["over_expression", "knock_down"] = "over_expression"
    """Whether the screen activates or represses its targets."""
    n_control: int = Field(1000, ge=1)
    """Control cells per context that predictions start from."""
    own_gene: Literal["as_decoded", "left_out"] = "as_decoded"
    """`left_out` predicts no change of the perturbed genes themselves: what the decoder knows beyond them."""


def warm_up_exponentially(epoch: int, n_epochs: int) -> float:
    """`(e^{t/T} − 1) / (e − 1)` of epoch t < T, and 1 after; the first epoch is 1."""
    return 1.0 if epoch >= n_epochs or n_epochs == 0 else math.expm1((epoch + 1) / n_epochs) / math.expm1(1.0)


def encoder_input(X: sparse.csr_matrix, likelihood: str) -> sparse.csr_matrix:
    """What the encoder sees of cells: `log(1 + counts / mean count)` for counts, log-normalised expression else.

    Counts over their mean within the cell are the same for counts and for their normalised version, so that
    log-normalised expression is all that is needed. Zeros stay zeros, so it is done once, on the stored values.

    Parameters
    ----------
    X
        Log-normalised expression, CSR (n_cells, n_genes).
    likelihood
        `nb` or `gaussian`.

    Returns
    -------
    csr_matrix
        float32 (n_cells, n_genes); shares the index arrays of `X`.
    """
    if likelihood == "gaussian":
        return X
    values = np.expm1(X.data)
    linear = sparse.csr_matrix((values, X.indices, X.indptr), shape=X.shape, copy=False)
    mean = np.asarray(linear.sum(axis=1), dtype=np.float64).ravel() / X.shape[1]
    factor = np.divide(1.0, mean, out=np.zeros_like(mean), where=mean > 0).astype(np.float32)
    values *= np.repeat(factor, np.diff(X.indptr))
    return sparse.csr_matrix((np.log1p(values, out=values), X.indices, X.indptr), shape=X.shape, copy=False)


class _Cells(NamedTuple):
    """What training steps draw from."""

    x: sparse.csr_matrix
    """Input of the encoder (n_cells, n_genes)."""
    labels: np.ndarray
    """Values of the heads (n_cells, n_heads)."""
    counts: sparse.csr_matrix | None
    """Counts, for their likelihood."""
    size: np.ndarray | None
    """Mean count of each cell (n_cells,)."""


class NBVAE(Method):
    """Variational autoencoder with auxiliary heads, and a predictor by its gradients (Bjerregaard et al. 2025).

    No perturbation label is seen in training unless a head names the column. `predict_one` starts from control cells,
    follows the gradient of the perturbed genes' decoded expression in unit steps, and adds the decoded change, times
    one factor for all perturbations (`calibration`), to the control mean. The factor is the least-squares slope of the
    observed on the predicted effects of the perturbations in training; it turns no direction.
    """

    Params = NBVAEParams
    stochastic = True
    params: NBVAEParams
    module: NBVAEModule

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self.needs_counts = self.params.likelihood == "nb"  # type: ignore[misc]
        self._genes: tuple[str, ...] = ()
        self._contexts: tuple[str, ...] = ()
        self._control: dict[str, Tensor] = {}

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Train on all cells, labels aside; keep the control cells' latents, from which predictions start.

        Raises
        ------
        MethodError
            If the likelihood needs counts that are not there.
        DataError
            If a head's column does not exist or holds no known label, or its name is a gene's.
        """
        self.check(data)
        self._genes, self._contexts = tuple(data.genes), tuple(sorted(set(data.context)))
        labels = self._labels(data, run.seed)
        kinds = tuple(head.kind for head in self.params.heads.values())
        with seeded_weights(run.seed):
            self.module = NBVAEModule(len(data.genes), kinds, self.params)
        train_rows = np.flatnonzero(~data.is_val)
        self._start(data, labels[train_rows], train_rows)
        self.module.to(run.device)
        cells = self._cells(data, labels)
        task = Task(
            self.module,
            lambda rows, random, epoch: self._step(cells, rows, random, epoch),
            train_rows,
            np.flatnonzero(data.is_val),
            # the labels of heads come from covariates, which the common fingerprint does not cover
            sha256_text(fingerprint(data, self.params, run.seed) + labels.tobytes().hex()),
        )
        train(task, self.params, run)
        self.module.eval().to("cpu")
        self._keep_control(data, np.random.default_rng([run.seed, 3]))
        self._calibrate(data)

    def _labels(self, data: TrainingData, seed: int) -> np.ndarray:
        """Values of the heads; NaN where unknown or masked (n_cells, n_heads)."""
        values = np.full((len(data.perturbation), len(self.params.heads)), np.nan, dtype=np.float32)
        for k, (name, head) in enumerate(self.params.heads.items()):
            if name in data.genes:
                raise DataError(f"head {name!r}: a gene has this name; choose another for the head")
            column = self._column(data, head.column, name)
            known = ~np.isin(column, [*head.unknown, "nan", ""])
            for key, masked in head.mask.items():
                known &= ~np.isin(self._column(data, key, name), masked)
            rng = np.random.default_rng([seed, 11, k])
            known &= rng.random(len(known)) < head.labelled_fraction
            if not (known & ~data.is_val).any():
                raise DataError(f"head {name!r}: no training cell has a known label in column {head.column!r}")
            if head.kind == "binary":
                values[known, k] = np.isin(column[known], head.positive)
            else:
                values[known, k] = self._numbers(column[known], name, head.column)
        return values

    def _column(self, data: TrainingData, column: str, head: str) -> np.ndarray:
        known = {"perturbation": data.perturbation, "context": data.context}
        if column in known:
            return np.asarray(known[column], dtype=str)
        if column not in data.covariates:
            options = [*known, *map(str, data.covariates.columns)]
            raise DataError(
                f"head {head!r}: no column {column!r}; name it in the card's keys.keep ({suggest(column, options)})"
            )
        return data.covariates[column].astype(str).to_numpy()

    @staticmethod
    def _numbers(values: np.ndarray, head: str, column: str) -> np.ndarray:
        try:
            return values.astype(np.float32)
        except ValueError:
            raise DataError(
                f"head {head!r}: column {column!r} holds values that are no numbers; use `unknown` or kind binary"
            ) from None

    @torch.no_grad()
    def _start(self, data: TrainingData, labels: np.ndarray, rows: np.ndarray) -> None:
        """Begin where the data are: mean expression as bias, its spread as noise, heads in units of theirs."""
        for k, kind in enumerate(self.module.kinds):
            if kind == "continuous":
                known = labels[np.isfinite(labels[:, k]), k]
                self.module.head_centre[k] = float(np.median(known))
                self.module.head_scale[k] = float(known.std()) or 1.0
        if not self.params.start_at_mean:
            return
        if self.params.likelihood == "gaussian":
            mean, square = (np.asarray(X.mean(axis=0)).ravel() for X in (data.X[rows], data.X[rows].power(2)))
            sd = np.sqrt(np.maximum(square - mean**2, 0.05**2))  # a gene may never vary
            self.module.log_dispersion.copy_(torch.from_numpy(np.log(sd).astype(np.float32)))
        else:
            assert data.counts is not None
            total = np.asarray(data.counts[rows].sum(axis=0), dtype=np.float64).ravel()
            share = (total + 0.5) / (total.mean() + 0.5)
            mean = np.where(share > 20, share, np.log(np.expm1(np.minimum(share, 20))))  # inverse of softplus
        self.module.output.bias[: len(self._genes)] = torch.from_numpy(mean.astype(np.float32))

    def _cells(self, data: TrainingData, labels: np.ndarray) -> _Cells:
        x = encoder_input(data.X, self.params.likelihood)
        if not self.needs_counts:
            return _Cells(x, labels, None, None)
        assert data.counts is not None
        size = np.maximum(np.asarray(data.counts.mean(axis=1)).ravel(), 1e-8)
        return _Cells(x, labels, data.counts, size)

    def _step(self, cells: _Cells, rows: np.ndarray, random: Random, epoch: int | None) -> LossTerms:
        device = str(random.torch.device)
        counts = None
        if cells.counts is not None:
            assert cells.size is not None
            counts = gather_counts(cells.counts, rows, cells.size, device)
        batch = Batch(dense_rows(cells.x, rows, device), torch.from_numpy(cells.labels[rows]).to(device), counts)
        weight = 1.0 if epoch is None else warm_up_exponentially(epoch, self.params.warm_up_epochs)
        noise = torch.randn(len(rows), self.params.n_latent, generator=random.torch, device=random.torch.device)
        weights = torch.tensor([head.weight for head in self.params.heads.values()], device=random.torch.device)
        return self.module.loss(batch, noise, kl_weight=weight * self.params.kl_weight, head_weights=weights)

    # --- representing -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of z, each (n_cells, n_latent)."""
        parts = []
        for start in range(0, X.shape[0], CHUNK):
            part = encoder_input(X[start : start + CHUNK], self.params.likelihood)
            parts.append(self.module.encode(dense_rows(part, np.arange(part.shape[0]))))
        mean = torch.cat([m for m, _ in parts]).numpy()
        return mean, torch.cat([v for _, v in parts]).sqrt().numpy()

    def represent(self, X: sparse.csr_matrix) -> np.ndarray:
        """Posterior mean of z (n_cells, n_latent)."""
        return self.encode(X)[0]

    # --- predicting -------------------------------------------------------------------------------------------------

    def _keep_control(self, data: TrainingData, rng: np.random.Generator) -> None:
        latents, factors, context, means = [], [], [], []
        for i, name in enumerate(self._contexts):
            pool = np.flatnonzero((data.perturbation == CONTROL) & (data.context == name))
            means.append(np.asarray(data.X[pool].mean(axis=0), dtype=np.float64).ravel())
            chosen = rng.permutation(pool)[: self.params.n_control]
            latents.append(self.encode(data.X[chosen])[0])
            factors.append(np.asarray(data.X[chosen].expm1().mean(axis=1)).ravel())
            context.append(np.full(len(chosen), i))
        self._control = {
            "z": torch.from_numpy(np.concatenate(latents)),
            "factor": torch.from_numpy(np.concatenate(factors).astype(np.float32)),
            "context": torch.from_numpy(np.concatenate(context)),
            "mean": torch.from_numpy(np.stack(means)),
            "calibration": torch.ones((), dtype=torch.float64),
        }

    def _calibrate(self, data: TrainingData) -> None:
        """One factor for all perturbations, from the training perturbations whose genes the decoder has."""
        slope = np.zeros(2)
        for name in sorted(set(data.perturbation) - {CONTROL}):
            if not set(genes_of(name)) <= set(self._genes):
                continue
            for i, context in enumerate(self._contexts):
                rows = (data.perturbation == name) & (data.context == context)
                if rows.any():
                    seen = np.asarray(data.X[rows].mean(axis=0)).ravel() - self._control["mean"][i].numpy()
                    predicted = self._change(name, context)
                    slope += predicted @ seen, predicted @ predicted
        if slope[1] > 0:
            self._control["calibration"] = torch.tensor(max(slope[0] / slope[1], 0.0), dtype=torch.float64)

    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Mean expression: control mean plus the calibrated change along the flow.

        Raises
        ------
        UnseenPerturbationError
            If a perturbed gene is not among the decoder's genes.
        """
        if context not in self._contexts:
            raise MethodError(f"context {context!r} was not in training; known: {', '.join(self._contexts)}")
        change = float(self._control["calibration"]) * self._change(perturbation, context)
        mean = self._control["mean"][self._contexts.index(context)].numpy() + change
        return {"mean": mean.astype(np.float32)}

    def _change(self, perturbation: str, context: str) -> np.ndarray:
        """Mean change of log-normalised expression from start to end of the flow (n_genes,)."""
        from perturbed.decoders.nb_vae import NBVAEDecoder
        from perturbed.gradients.flow import Move, follow

        missing = [gene for gene in genes_of(perturbation) if gene not in set(self._genes)]
        if missing:
            raise UnseenPerturbationError(f"the decoder has no output for {', '.join(missing)}")
        if not genes_of(perturbation):
            return np.zeros(len(self._genes))
        sign = 1 if self.params.direction == "over_expression" else -1
        rows = self._control["context"] == self._contexts.index(context)
        z, factor = self._control["z"][rows], self._control["factor"][rows]
        moves = [Move((gene,), sign) for gene in genes_of(perturbation)]
        path = follow(NBVAEDecoder(self), z, {}, moves, n_steps=self.params.n_steps, unit=True)
        start, end = (self._log_normalised(torch.from_numpy(path.z[i]), factor) for i in (0, -1))
        change = (end - start).double().mean(dim=0).numpy()
        if self.params.own_gene == "left_out":
            change[[self._genes.index(gene) for gene in genes_of(perturbation)]] = 0.0
        return change

    @torch.no_grad()
    def _log_normalised(self, z: Tensor, factor: Tensor) -> Tensor:
        expression = self.module.expression(self.module.activations(z)[0])
        return expression if self.params.likelihood == "gaussian" else torch.log1p(expression * factor[:, None])

    # --- keeping ----------------------------------------------------------------------------------------------------

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the outputs."""
        return self._genes

    def state(self) -> dict[str, Tensor]:
        """Weights, and the latents of the control cells."""
        weights = {f"module.{key}": value for key, value in self.module.state_dict().items()}
        return weights | {f"control.{key}": value for key, value in self._control.items()}

    def meta(self) -> dict[str, Any]:
        """Names of genes and contexts."""
        return {"genes": self._genes, "contexts": self._contexts}

    def load_state(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        self._genes, self._contexts = tuple(meta["genes"]), tuple(meta["contexts"])
        kinds = tuple(head.kind for head in self.params.heads.values())
        self.module = NBVAEModule(len(self._genes), kinds, self.params)
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "control": {}}
        for key, value in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.module.load_state_dict(parts["module"])
        self.module.eval()
        self._control = parts["control"]
