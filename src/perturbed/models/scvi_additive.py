"""The additive baseline in the latent space of scVI (Lopez et al. 2018), trained by scvi-tools.

scvi-tools and torch are imported only where they are needed; importing them takes seconds.
"""

from __future__ import annotations

import logging
import random
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

from perturbed.device import one_process
from perturbed.errors import MethodError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.latent_additive import LatentAdditive, LatentAdditiveParams

CHUNK = 2048
"""Cells encoded at once."""


class ScviAdditiveParams(LatentAdditiveParams):
    """Hyper-parameters of the additive baseline on scVI's latents; defaults are those of scvi-tools but for the NB."""

    n_control: int = Field(200, ge=1)
    """Control cells of each context that are shifted and decoded; the moments of counts are dear."""
    n_latent: int = Field(10, ge=1)
    """Latent dimensions."""
    n_hidden: int = Field(128, ge=1)
    """Width of encoder and decoder."""
    n_layers: int = Field(1, ge=1)
    """Hidden layers of encoder and decoder."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout in the encoder."""
    batch_key: str | None = None
    """Covariate of the cells that the decoder is told, such as `batch`; leave out where there is none."""
    expectation: Literal["moments", "log1p_of_mean"] = "moments"
    """`moments`: expectation of log-normalised counts, which is what predictions are compared with. `log1p_of_mean`:
    logarithm of the expected normalised counts, which is larger."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of Adam."""
    batch_size: int = Field(128, ge=2)
    """Cells per step."""
    epochs: int = Field(100, ge=1)
    """Passes over the training cells. scvi-tools takes 400 up to 20,000 cells, fewer in proportion above."""
    patience: int | None = Field(45, ge=1)
    """Stop when the validation ELBO has not improved for so many epochs; without validation cells it has no effect."""


class ScviAdditive(LatentAdditive):
    """Additive on posterior means of scVI with a negative binomial likelihood.

    `x̂ = mean over control cells i of E[log1p(s_i k)]`, `k ~ NB(l_i ρ(z_i + Σ_g δ_g), θ)`, with ρ the decoder's shares,
    l_i the cell's counts on these genes, s_i its factor from counts to normalised expression, its batch kept. Cells
    without any count on these genes are left out. An interrupted fit starts afresh: scvi-tools cannot resume one.
    """

    Params = ScviAdditiveParams
    params: ScviAdditiveParams
    needs_counts = True
    stochastic = True
    uses_torch = True

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Train scVI on the training cells, encode all, and average the latents of every condition.

        Raises
        ------
        MethodError
            If the data have no counts, or no covariate `batch_key`.
        """
        self.check(data)
        assert data.counts is not None
        counted = np.diff(data.counts.indptr) > 0
        data = data if counted.all() else _choose(data, np.flatnonzero(counted))
        assert data.counts is not None
        batch = self._batches(data)
        with _seeded(run.seed):
            self._train(data, batch, run)
        rows = self._learn_shifts(data, self._encode(data.counts), run.seed)
        size = np.asarray(data.counts[rows].sum(axis=1), dtype=np.float64).ravel()
        normalised = np.asarray(data.X[rows].astype(np.float64).expm1().sum(axis=1)).ravel()
        self._cells = {"size": size, "scale": normalised / size, "batch": batch[rows]}

    def _batches(self, data: TrainingData) -> np.ndarray:
        """Number of the batch of each cell; sets the batches' names."""
        key = self.params.batch_key
        if key is None:
            self._batch_names: tuple[str, ...] = ("all",)
            return np.zeros(len(data.perturbation), dtype=np.int64)
        if key not in data.covariates:
            known = ", ".join(data.covariates.columns) or "none"
            raise MethodError(f"scvi_additive: batch_key {key!r} is no covariate of these cells; known: {known}")
        names, batch = np.unique(data.covariates[key].astype(str).to_numpy(), return_inverse=True)
        self._batch_names = tuple(map(str, names))
        return batch.astype(np.int64)

    # --- scVI -------------------------------------------------------------------------------------------------------

    def _train(self, data: TrainingData, batch: np.ndarray, run: FitRun) -> None:
        import anndata
        import scvi

        p = self.params
        train, val = np.flatnonzero(~data.is_val), np.flatnonzero(data.is_val)
        obs = pd.DataFrame({"batch": batch.astype(str)}, index=[str(i) for i in range(len(batch))])
        adata = anndata.AnnData(data.counts, obs=obs)
        with _quiet("scvi", "lightning.pytorch", "lightning.fabric"), tempfile.TemporaryDirectory() as folder:
            scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
            shape = {"n_hidden": p.n_hidden, "n_latent": p.n_latent, "n_layers": p.n_layers}
            model = scvi.model.SCVI(adata, gene_likelihood="nb", dropout_rate=p.dropout, **shape)
            stopping = p.patience is not None and len(val) > 0
            with _interruptible(), one_process():
                model.train(
                    max_epochs=p.epochs,
                    accelerator="gpu" if run.device.startswith("cuda") else "cpu",
                    devices=1,
                    batch_size=p.batch_size,
                    datasplitter_kwargs={"external_indexing": [train, val, val[:0]]},
                    plan_kwargs={"lr": p.lr},
                    early_stopping=stopping,
                    check_val_every_n_epoch=1 if len(val) else None,
                    **({"early_stopping_patience": p.patience} if stopping else {}),
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    default_root_dir=folder,
                )
        if run.history is not None:
            for row in _read_history(model.history):
                run.history(row)
        self._module = model.module.to("cpu").eval()

    def _build(self, n_genes: int) -> Any:
        from scvi.module import VAE

        p = self.params
        return VAE(
            n_input=n_genes,
            n_batch=len(self._batch_names),
            n_hidden=p.n_hidden,
            n_latent=p.n_latent,
            n_layers=p.n_layers,
            dropout_rate=p.dropout,
            gene_likelihood="nb",
        )

    def _encode(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Posterior means of the latents, float64 (n_cells, n_latent); the encoder is not told the batch."""
        import torch

        found = []
        with torch.no_grad(), _seeded(0):  # scvi-tools also draws a sample, which is not used
            for start in range(0, counts.shape[0], CHUNK):
                block = torch.from_numpy(np.asarray(counts[start : start + CHUNK].toarray(), dtype=np.float32))
                none = torch.zeros(len(block), 1, dtype=torch.long)
                found.append(self._module.inference(block, none)["qz"].loc.double().numpy())
        return np.concatenate(found) if found else np.zeros((0, self.params.n_latent))

    def represent(self, X: sparse.csr_matrix, counts: sparse.csr_matrix | None = None) -> np.ndarray:
        """Posterior means of scVI's latents (n_cells, n_latent).

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).
        counts
            Counts of the same cells and genes. Without them they are recovered from X: see `recover_counts`.
        """
        return self._encode(recover_counts(X) if counts is None else counts)

    def _decode(self, latents: np.ndarray, rows: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        import torch

        from perturbed.models.nn.likelihoods import nb_log1p_moments

        size, scale = self._cells["size"][rows], self._cells["scale"][rows]
        with torch.no_grad():
            batch = torch.from_numpy(self._cells["batch"][rows])[:, None]
            library = torch.from_numpy(np.log(size).astype(np.float32))[:, None]
            z = torch.from_numpy(latents.astype(np.float32))
            px = self._module.generative(z, library, batch)["px"]
            mean = px.mu.double().numpy()
            theta = self._module.px_r.double().exp().numpy()
        if rng is not None:
            return np.log1p(scale[:, None] * rng.poisson(rng.gamma(theta, mean / theta)))
        if self.params.expectation == "log1p_of_mean":
            return np.log1p(scale[:, None] * mean)
        return nb_log1p_moments(np.maximum(mean, 1e-12), theta, scale)[0]

    # --- keeping ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Weights of scVI, shifts and control cells, as tensors."""
        import torch

        arrays = super().state() | {f"cells.{key}": value for key, value in self._cells.items()}
        weights = {f"module.{key}": value.detach() for key, value in self._module.state_dict().items()}
        return weights | {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}

    def meta(self) -> dict[str, Any]:
        """Names of genes, contexts, perturbations and batches."""
        return super().meta() | {"batches": self._batch_names}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model: build scVI's module in its shape and load the weights."""
        super().load_state(state, meta)
        self._batch_names = tuple(meta["batches"])
        self._cells = {key: state[f"cells.{key}"].numpy() for key in ("size", "scale", "batch")}
        with _seeded(0):  # the weights drawn here are replaced
            self._module = self._build(len(self._genes))
        weights = {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}
        self._module.load_state_dict(weights)
        self._module.eval()


def recover_counts(X: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts of cells from their values `log1p(s k)` with an unknown factor s per cell.

    The smallest non-zero `expm1` of a cell stands for 1, 2, … or 20 counts: the first number that makes all of the
    cell's values whole. Exact unless all counts of a cell share a divisor; a cell that nothing makes whole (no counts
    were there) is rounded as if the smallest were 1.
    """
    found = sparse.csr_matrix(X, dtype=np.float64, copy=True)
    found.eliminate_zeros()
    length = np.diff(found.indptr)
    filled = np.flatnonzero(length)
    if not len(filled):
        return found.astype(np.float32)
    starts, of_cell = found.indptr[filled], np.repeat(np.arange(len(filled)), length[filled])
    ratio = np.expm1(found.data)
    ratio /= np.minimum.reduceat(ratio, starts)[of_cell]
    smallest = np.ones(len(filled))
    undecided = np.ones(len(filled), dtype=bool)
    for count in range(1, 21):
        value = ratio * count
        # float32 logarithms leave relative errors of about 1e-6
        whole = np.abs(value - np.rint(value)) <= np.minimum(1e-5 * value + 1e-3, 0.1)
        fits = np.logical_and.reduceat(whole, starts) & undecided
        smallest[fits], undecided = count, undecided & ~fits
        if not undecided.any():
            break
    found.data = np.rint(ratio * smallest[of_cell])
    return found.astype(np.float32)


def _choose(data: TrainingData, rows: np.ndarray) -> TrainingData:
    """Some of the cells, with what is used here."""
    assert data.counts is not None
    return replace(
        data,
        X=data.X[rows],
        counts=data.counts[rows],
        perturbation=data.perturbation[rows],
        context=data.context[rows],
        is_val=data.is_val[rows],
        covariates=data.covariates.iloc[rows] if len(data.covariates) else data.covariates,
    )


_TERMS = {
    "loss": "elbo_train",
    "reconstruction": "reconstruction_loss_train",
    "kl": "kl_local_train",
    "val_loss": "elbo_validation",
}
"""Our names of what scvi-tools logs."""


def _read_history(history: Mapping[str, pd.DataFrame]) -> list[dict[str, float]]:
    """Terms by epoch, of those that scvi-tools logged."""
    columns = {ours: history[theirs].iloc[:, 0] for ours, theirs in _TERMS.items() if theirs in history}
    table = pd.DataFrame({name: column.astype(float) for name, column in columns.items()}).dropna()
    return [{"epoch": float(epoch), **row} for epoch, row in enumerate(table.to_dict("records"))]  # type: ignore[dict-item]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which scvi-tools draws from, and put them back afterwards."""
    import torch

    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep libraries from announcing themselves on the terminal."""
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning|scvi)\.")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make an interrupt an interrupt again: lightning turns it into an exit and leaves Ctrl-C ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
