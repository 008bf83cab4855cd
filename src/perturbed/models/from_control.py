"""What the networks share that predict from the control cells they were fitted on: names, state, observation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from perturbed.config import Section
from perturbed.errors import MethodError
from perturbed.models.base import Method, require_seen
from perturbed.models.nn.likelihoods import nb_log1p_moments
from perturbed.training import Random

CHUNK = 512
"""Cells encoded or decoded at a time."""
MEAN_SAMPLES = 1000
"""At least so many samples are averaged where the mean is one of samples; every control cell counts the same."""
NB_CELLS = 200
"""Control cells behind a predicted mean of counts."""


class FromControl(Method):
    """Base of the networks that are fitted with perturbation labels and predict from kept control cells.

    `_control` holds, with one row per kept control cell: `mean` and `sd` of its latents, `context` (place in
    `contexts`) and, for counts, `size` (counts on these genes) and `scale` (from counts to normalised expression).
    """

    stochastic = True
    params: Any
    module: Any
    title: ClassVar[str]
    """Name in error messages."""

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self._genes: tuple[str, ...] = ()
        self._perturbed: tuple[str, ...] = ()
        self._contexts: tuple[str, ...] = ()
        self._control: dict[str, Tensor] = {}

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    @property
    def perturbed(self) -> tuple[str, ...]:
        """Genes that were perturbed in training, in the order of the condition vector."""
        return self._perturbed

    @property
    def contexts(self) -> tuple[str, ...]:
        """Contexts of training."""
        return self._contexts

    # --- asking -----------------------------------------------------------------------------------------------------

    def _require(self, perturbation: str, context: str) -> tuple[str, ...]:
        """The genes of a perturbation that can be predicted.

        Raises
        ------
        UnseenPerturbationError
            If a gene was perturbed in no training cell.
        MethodError
            If the context had no control cells in training.
        """
        genes = require_seen(perturbation, self._perturbed, self.title)
        if context not in self._contexts:
            raise MethodError(f"context {context!r} was not in training; known: {', '.join(self._contexts)}")
        return genes

    def _control_of(self, context: str) -> Tensor:
        """Rows of the kept control cells of a context."""
        return torch.nonzero(self._control["context"] == self._contexts.index(context)).ravel()

    def _condition(self, genes: tuple[str, ...]) -> Tensor:
        """Multi-hot of the perturbed genes (1, n_perturbed)."""
        condition = torch.zeros(1, len(self._perturbed))
        condition[0, [self._perturbed.index(gene) for gene in genes]] = 1
        return condition

    # --- predicting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Mean expression, and variance and generated cells where `n_samples` is above 0; raises as `_require`."""
        genes = self._require(perturbation, context)
        result: dict[str, np.ndarray] = {}
        if self.params.n_samples:
            random = Random.seeded(seed, 4)
            result["cells"], result["variance"] = self._generate(genes, context, random, self.params.n_samples)
        result["mean"] = self.predict_mean(perturbation, context, seed=seed)
        return result

    @torch.no_grad()
    def predict_mean(self, perturbation: str, context: str, *, seed: int = 0) -> np.ndarray:
        """Mean expression under a perturbation, float32 (n_genes,); raises as `_require`."""
        return self._mean(self._require(perturbation, context), context, seed).astype(np.float32)

    @abstractmethod
    def _decode(self, genes: tuple[str, ...], rows: Tensor, random: Random | None) -> Tensor:
        """Decode control cells `rows` as if perturbed: at latent means, or sampled where `random` is given."""

    def _mean(self, genes: tuple[str, ...], context: str, seed: int) -> np.ndarray:
        """Mean over the context's control cells, float64 (n_genes,)."""
        rows = self._control_of(context)
        if "size" in self._control:
            rows = rows[:NB_CELLS]  # the moments of the counts are dear; the order is random
        random = None
        if self.params.predict == "sample":
            random = Random.seeded(seed, 5)
            rows = rows if "size" in self._control else rows.repeat(-(-MEAN_SAMPLES // len(rows)))
        parts = rows.split(CHUNK)
        total = sum(self._expect(self._decode(genes, part, random), part)[0].sum(0) for part in parts)
        return np.asarray(total / len(rows))

    def _generate(
        self, genes: tuple[str, ...], context: str, random: Random, n_cells: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generated cells (n_cells, n_genes), and the variance of such cells (n_genes,)."""
        pool = self._control_of(context)
        rows = pool[torch.from_numpy(random.numpy.integers(len(pool), size=n_cells))]
        decoded = self._decode(genes, rows, random)
        mean, variance = self._expect(decoded, rows)
        total_variance = mean.var(axis=0) + variance.mean(axis=0)
        return self._observe(decoded, rows, random).astype(np.float32), total_variance.astype(np.float32)

    # --- observing --------------------------------------------------------------------------------------------------

    @property
    def log_noise(self) -> Tensor | None:
        """Logarithm of each gene's inverse dispersion (counts) or observation noise (Gaussian); None: no noise."""
        return None

    def _expect(self, decoded: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the observation, on the scale of log-normalised expression, given decoded latents."""
        noise = self.log_noise
        if "size" in self._control:
            assert noise is not None
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            return nb_log1p_moments(mean, noise.double().exp().numpy(), self._control["scale"][rows].numpy())
        value = decoded.double().numpy()
        variance = 0.0 if noise is None else noise.double().mul(2).exp().numpy()
        return value, np.broadcast_to(variance, value.shape)

    def _observe(self, decoded: Tensor, rows: Tensor, random: Random) -> np.ndarray:
        """Draw observations given decoded latents."""
        noise = self.log_noise
        if "size" in self._control:
            assert noise is not None
            mean = decoded.double().exp().numpy() * self._control["size"][rows, None].numpy()
            theta = noise.double().exp().numpy()
            counts = random.numpy.poisson(random.numpy.gamma(theta, mean / theta))
            return np.asarray(np.log1p(counts * self._control["scale"][rows, None].numpy()))
        if noise is None:
            return decoded.numpy()
        return (decoded + noise.exp() * torch.randn(decoded.shape, generator=random.torch)).numpy()

    # --- keeping ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _rebuild(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The network for the names that are held; `state` has its weights, should their shapes be needed."""

    def state(self) -> dict[str, Any]:
        """Weights, and the posterior of the control cells."""
        weights = {f"module.{key}": value for key, value in self.module.state_dict().items()}
        return weights | {f"control.{key}": value for key, value in self._control.items()}

    def meta(self) -> dict[str, Any]:
        """Names of genes, perturbed genes and contexts."""
        return {"genes": self._genes, "perturbed": self._perturbed, "contexts": self._contexts}

    def load_state(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        self._genes, self._perturbed = tuple(meta["genes"]), tuple(meta["perturbed"])
        self._contexts = tuple(meta["contexts"])
        weights = _strip(state, "module.")
        self.module = self._rebuild(weights)
        self.module.load_state_dict(weights)
        self.module.eval()
        self._control = _strip(state, "control.")


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
