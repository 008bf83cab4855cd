"""SENA-discrepancy-VAE: a discrepancy-VAE whose encoder reads gene sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perturbed.config import Section
from perturbed.errors import DataError, MethodError
from perturbed.models.base import TrainingData
from perturbed.models.discrepancy_vae import DiscrepancyVAE, DiscrepancyVAEParams
from perturbed.models.discrepancy_vae_module import Weights
from perturbed.models.from_control import CHUNK
from perturbed.training import dense_rows

log = logging.getLogger(__name__)


class SenaParams(DiscrepancyVAEParams):
    """Hyper-parameters of SENA-discrepancy-VAE; the defaults of its authors' code."""

    mask_leak: float = Field(0.0, ge=0, le=1)
    """Factor λ on the weights of genes outside a set (the authors' default is 0). 1 gives a dense encoder."""
    min_set_size: int = Field(5, ge=1)
    """Gene sets with fewer measured genes are left out."""
    mmd_weight: float = Field(1.0, ge=0)
    """Weight α of the discrepancy, reached in the middle of training."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight β of the KL, reached in the last epoch; the KL is averaged over latents and once more divided by the batch
    size, as in the authors' code, so that it weighs next to nothing."""
    edge_penalty: float = Field(0.1, ge=0)
    """Weight of the mean absolute edge of the graph."""
    temperature: float = Field(100.0, gt=0)
    """Temperature of the targets in the last epoch; it rises from 1."""
    predict_temperature: float | None = Field(1000.0, gt=0)
    """Temperature of predictions: every gene acts on one latent. None takes the last of training."""
    mmd_width: float = Field(200.0, gt=0)
    """Middle width of the ten Gaussian kernels of the discrepancy."""


def read_gene_sets(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Gene sets of a GMT file: name, description and genes of one set per line, separated by tabs.

    Raises
    ------
    DataError
        If the file cannot be read, a line has no gene, or a name comes twice.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a GMT file ({error}); name another under files.gene_sets") from None
    sets: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        genes = tuple(gene for gene in rest[1:] if gene)
        if not name or not genes:
            raise DataError(f"{path}: line {number} is not `name<tab>description<tab>gene…`; mend or remove it")
        if name in sets:
            raise DataError(f"{path}: line {number}: gene set {name!r} comes twice; rename or merge them")
        sets[name] = genes
    return sets


class Sena(DiscrepancyVAE):
    """SENA-discrepancy-VAE (de la Fuente et al. 2025).

    The first layer of the encoder has one unit per gene set and sees the set's genes in full and all others by λ.
    """

    Params = SenaParams
    title = "SENA"
    params: SenaParams

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self._sets: tuple[str, ...] = ()

    def check(self, data: TrainingData) -> None:
        """Refuse data without gene sets.

        Raises
        ------
        MethodError
            If the dataset's card names no gene-set file, or a context lacks control cells.
        """
        super().check(data)
        self.require_file(data, "gene_sets")

    def _encoder_mask(self, data: TrainingData) -> Tensor:
        path = self.require_file(data, "gene_sets")
        sets = read_gene_sets(path)
        column = {gene: i for i, gene in enumerate(data.genes)}
        members = {name: sorted({column[gene] for gene in genes if gene in column}) for name, genes in sets.items()}
        if not any(members.values()):
            raise MethodError(
                f"{path}: none of its {len(sets)} gene sets holds a gene of these data (such as {data.genes[0]!r}); "
                "use gene sets with the same kind of names"
            )
        kept = {name: genes for name, genes in sorted(members.items()) if len(genes) >= self.params.min_set_size}
        if not kept:
            largest = max(map(len, members.values()))
            raise MethodError(
                f"{path}: its largest gene set has {largest} genes of these data, fewer than min_set_size "
                f"{self.params.min_set_size}; lower min_set_size"
            )
        log.info(
            "%s: %d gene sets used, %d with fewer than %d measured genes left out; they hold %d of %d genes",
            path, len(kept), len(sets) - len(kept), self.params.min_set_size,
            len(set().union(*kept.values())), len(data.genes),
        )  # fmt: skip
        self._sets = tuple(kept)
        mask = torch.full((len(kept), len(data.genes)), self.params.mask_leak)
        for row, genes in enumerate(kept.values()):
            mask[row, genes] = 1.0
        return mask

    def weights(self, epoch: int | None) -> Weights:
        """Weights of the loss in an epoch, on the authors' scale: KL per latent and batch size, mean edge."""
        base = super().weights(epoch)
        n = len(self.module.graph)
        return base._replace(kl=base.kl / (n * self.params.batch_size), edges=base.edges / (n * (n - 1) / 2))

    @torch.no_grad()
    def activity(self, X: sparse.csr_matrix) -> np.ndarray:
        """Activity of each gene set in cells, the output of the masked layer (n_cells, n_sets).

        Parameters
        ----------
        X
            Log-normalised expression on `genes`, CSR (n_cells, n_genes).
        """
        parts = np.array_split(np.arange(X.shape[0]), max(1, -(-X.shape[0] // CHUNK)))
        return torch.cat([self.module.encoder[0](dense_rows(X, part)) for part in parts]).numpy()

    @property
    def gene_sets(self) -> tuple[str, ...]:
        """Names of the gene sets of the encoder, in the order of `activity`."""
        return self._sets

    def meta(self) -> dict[str, Any]:
        """Names of genes, perturbed genes, contexts and gene sets."""
        return {**super().meta(), "gene_sets": self._sets}

    def load_state(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        super().load_state(state, meta)
        self._sets = tuple(meta["gene_sets"])
