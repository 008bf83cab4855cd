"""Training cells where the device reads them fastest: sparse on the CPU, in half precision on a GPU, or streamed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Placement = Literal["sparse", "dense_half", "streamed", "on_disk"]

MEMORY_SHARE = 0.5
"""Share of the GPU's free memory that the cells may take; the rest is for the model, its gradients and a batch."""
LARGEST_HALF = 60_000.0
"""Values beyond this do not fit half precision (its largest is 65,504)."""
CHUNK = 4096
"""Cells made dense at a time while they are carried over."""


def choose_placement(matrix: Any, device: str, free_bytes: int | None = None) -> Placement:
    """Where a matrix of cells is kept while a model trains on `device`.

    `sparse` on the CPU. On a GPU `dense_half` where `2 n_cells n_genes` bytes are at most `MEMORY_SHARE` of the free
    memory, else `streamed`: the non-zeros of each batch travel. Both round to half precision (relative error at most
    2⁻¹¹), so that the memory that happens to be free changes no result. `on_disk` for a
    `perturbed.data.streaming.StreamedMatrix`, whose batches are read, made dense and carried over in float32.

    Parameters
    ----------
    matrix
        Log-normalised expression, CSR (n_cells, n_genes).
    device
        A torch device.
    free_bytes
        Free memory of the GPU; asked of it where not given.
    """
    if hasattr(matrix, "load"):
        return "on_disk"
    where = torch.device(device)
    if where.type == "cpu":
        return "sparse"
    free = torch.cuda.mem_get_info(where)[0] if free_bytes is None else free_bytes
    return "dense_half" if 2 * matrix.shape[0] * matrix.shape[1] <= MEMORY_SHARE * free else "streamed"


class ResidentCells:
    """Rows of a CSR matrix as dense float32 batches on a device.

    Parameters
    ----------
    matrix
        Log-normalised expression (n_cells, n_genes).
    device
        Where batches go.
    placement
        Where the cells are kept; chosen by `choose_placement` where not given.

    Raises
    ------
    ValueError
        If half precision cannot hold the values.
    """

    def __init__(self, matrix: Any, device: str = "cpu", placement: Placement | None = None) -> None:
        self.matrix, self.device = matrix, device
        self.placement: Placement = placement or choose_placement(matrix, device)
        self._dense: Tensor | None = None
        if (
            self.placement in ("dense_half", "streamed")
            and matrix.nnz
            and float(np.abs(matrix.data).max()) > LARGEST_HALF
        ):
            raise ValueError(
                f"expression above {LARGEST_HALF:,.0f} does not fit half precision; log-normalise it first"
            )
        if self.placement == "dense_half":
            n_cells, n_genes = matrix.shape
            self._dense = torch.empty(n_cells, n_genes, dtype=torch.float16, device=device)
            for start in range(0, n_cells, CHUNK):
                part = matrix[start : start + CHUNK].toarray().astype(np.float16)
                self._dense[start : start + CHUNK] = torch.from_numpy(part).to(device)

    def take(self, rows: np.ndarray) -> Tensor:
        """Cells `rows` in that order, float32 (n_rows, n_genes)."""
        if self._dense is not None:
            return self._dense[torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self.device)].float()
        chosen = self.matrix[rows]
        if self.placement in ("sparse", "on_disk"):
            return torch.from_numpy(np.asarray(chosen.toarray(), dtype=np.float32)).to(self.device)
        n_rows, n_genes = chosen.shape
        cell = np.repeat(np.arange(n_rows, dtype=np.int64), np.diff(chosen.indptr))
        position = torch.from_numpy(cell * n_genes + chosen.indices).to(self.device)
        value = torch.from_numpy(chosen.data.astype(np.float16)).to(self.device).float()
        flat = torch.zeros(n_rows * n_genes, device=self.device)
        return flat.index_copy_(0, position, value).view(n_rows, n_genes)
