"""Time and memory of axis scores at the size of the published Census model.

10,000 cells, 8,000 genes, 50 latents, two hidden layers of 128, 11,000 batches of which the cells hold 24 (one per
donor); random weights, since weights do not change the time. `scores` makes the mean cosine and the gradient norm of
every gene, `draws` adds 1,000 bootstrap draws of the donors and 1,000 permutations of their labels, each with an axis
of its own. `group` is what `perturbed score-genes` does for one group of cells: the same, once more before softmax (a
second pass over the Jacobian), the other kinds of axes, halves of the donors and the mean expression. `literal` is the
naive way: one backward pass for each gene and cell.

    python benchmarks/axis_scores.py [--threads 2] [--cells 10000]
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from perturbed.axis.axes import (
    Weights,
    bootstrap_weights,
    make_axes,
    observed_weights,
    permute_labels,
    sum_donors,
    unit,
)
from perturbed.axis.cells import AxisCells
from perturbed.axis.compact import CompactDecoder
from perturbed.axis.groups import score_group
from perturbed.axis.spec import POOLED, AxisCase
from perturbed.axis.unit_gradients import score_along, sum_gradients
from perturbed.decoders.scvi import SCVIDecoder
from perturbed.gradients.spec import CellGroup

SECONDS, MEMORY_MB = 20.0, 1024
N_GENES, N_LATENT, N_HIDDEN, N_BATCH, N_DONORS = 8000, 50, 128, 11000, 24


def make_decoder() -> SCVIDecoder:
    """A decoder of the published size without a checkpoint."""
    from scvi.module import VAE

    decoder = SCVIDecoder.__new__(SCVIDecoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = VAE(N_GENES, n_batch=N_BATCH, n_hidden=N_HIDDEN, n_latent=N_LATENT, n_layers=2)
    module.eval().requires_grad_(False)
    # what is not asked of it here (encoder, dispersions) would count as memory
    decoder.module = SimpleNamespace(decoder=module.decoder, batch_representation="one-hot")
    decoder.genes = tuple(f"g{i}" for i in range(N_GENES))
    decoder.batches = tuple(f"batch{i}" for i in range(N_BATCH))
    decoder.n_latent = N_LATENT
    return decoder


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_case(n_cells: int) -> AxisCase:
    """A case without cell types that scores all cells, with the numbers of draws that are the default."""
    arms = {key: CellGroup(column="disease", values=(key,)) for key in ("unperturbed", "perturbed")}
    return AxisCase(cells="cells", model="model", groups=None, study=None, n_cells=n_cells, **arms)


def as_cells(
    decoder: CompactDecoder, z: np.ndarray, batch: np.ndarray, donor: np.ndarray, arm: np.ndarray
) -> AxisCells:
    """The cells as the verb reads them."""
    donors = pd.DataFrame({"donor": np.arange(len(arm)), "study": "", "arm": arm})
    n, genes = len(z), np.array(decoder.genes, dtype=object)
    none, names = np.zeros(n, dtype=bool), np.arange(n).astype(str)
    kind = np.full(n, POOLED, dtype=object)
    return AxisCells(Path(), names, z, batch, arm[donor], donor, donors, kind, decoder, genes, None, none)


def literal_seconds(decoder: CompactDecoder, z: np.ndarray, batch: np.ndarray) -> float:
    """Seconds a cell of one backward pass per gene, from a few of them."""
    x = torch.from_numpy(z[:1]).requires_grad_(True)
    y = decoder.decode(x, decoder.context(list(batch[:1]))).expression[0]
    start = time.perf_counter()
    for g in range(40):
        torch.autograd.grad(y[g], x, retain_graph=True)
    return (time.perf_counter() - start) / 40 * N_GENES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    donor = np.sort(rng.integers(0, N_DONORS, options.cells))
    arm = np.arange(N_DONORS) % 2
    z = rng.normal(size=(options.cells, N_LATENT)).astype(np.float32) + 0.3 * arm[donor][:, None].astype(np.float32)
    full = make_decoder()
    batch = np.array([full.batches[400 * d] for d in donor], dtype=object)
    decoder = CompactDecoder(full, list(dict.fromkeys(batch)))
    context = decoder.context(list(batch))
    sums = sum_donors(z, donor, arm[donor], N_DONORS)
    observed = observed_weights(arm)
    axis = make_axes("means", sums, observed)
    before = peak_mb()

    def run(weights: Weights, axes: np.ndarray) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        score_along(sum_gradients(decoder, z, context, donor, axis[0]), unit(axes), weights, arm, N_GENES)
        return time.perf_counter() - start, time.process_time() - cpu

    alone, cpu = run(observed, axis)
    after = peak_mb()
    print(f"axis scores: {options.cells} cells, {N_GENES} genes, {N_LATENT} latents, {options.threads} threads")
    speed = options.cells / alone
    print(f"  scores  {alone:6.1f} s ({speed:.0f} cells/s), {cpu:.1f} s of processor   target {SECONDS:.0f} s")
    print(f"  memory  {after:6.0f} MiB, {after - before:.0f} of it scoring   target {MEMORY_MB} MiB")
    study = np.zeros(N_DONORS, dtype=object)
    drawn = (observed, bootstrap_weights(arm, 1000, 0), permute_labels(arm, study, 1000, 0).weights)
    weights = Weights(*(np.hstack([w[k] for w in drawn]) for k in (0, 1)))
    both, cpu = run(weights, make_axes("means", sums, weights))
    print(f"  draws   {both:6.1f} s with 2,000 axes and weightings, {cpu:.1f} s of processor, {peak_mb():.0f} MiB")
    start, cpu = time.perf_counter(), time.process_time()
    score_group(as_cells(decoder, z, batch, donor, arm), POOLED, make_case(options.cells))
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"  group   {spent:6.1f} s as the verb does it, {cpu:.1f} s of processor, {peak_mb():.0f} MiB")
    per_cell = literal_seconds(decoder, z, batch)
    print(f"  literal {per_cell * options.cells:6.0f} s would one backward pass per gene take")


if __name__ == "__main__":
    main()
