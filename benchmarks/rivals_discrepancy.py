"""Training speed of the discrepancy-VAE and SENA beside their roofline: a bare net of the same shapes, in one run.

The bare net encodes the control cells, decodes them twice (as they are and intervened on), goes backward from a squared
error and takes an Adam step in float32, with a fixed batch already in memory: no sampling, no densifying, no causal
layer, no KL, no discrepancy.

    python benchmarks/rivals_discrepancy.py [--threads 2] [--batch 32 512] [--cells 10000] [--genes 5000] [--sets 400]
                                            [--seconds 8]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from training import make_cells

from perturbed.models.base import TrainingData
from perturbed.models.cells import PairedCells
from perturbed.models.discrepancy_vae import DiscrepancyVAE
from perturbed.models.discrepancy_vae_module import condition_batches
from perturbed.models.nn.mlp import build_mlp
from perturbed.models.sena import Sena
from perturbed.training import Random

SHARE = 0.33
CELLS_PER_SECOND = {("discrepancy-VAE", 32): 2300.0}
"""By method and batch, on two idle cores at 5,000 genes; the published code did 58."""


def bare_step(data: TrainingData, n_first: int, batch: int) -> Callable[[], None]:
    """One step of the bare net; `n_first` units in the encoder's hidden layer."""
    n_genes = len(data.genes)
    encoder, heads = build_mlp((n_genes, n_first), last=True), nn.Linear(n_first, 210)
    decoder = build_mlp((105, 128, n_genes), last=True)
    optimiser = torch.optim.Adam([*encoder.parameters(), *heads.parameters(), *decoder.parameters()], fused=True)
    x = torch.from_numpy(data.X[: 2 * batch].toarray())

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        latent = heads(encoder(x[batch:]))[:, :105]
        (decoder(torch.cat([latent, latent + 1])) - x).square().mean().backward()
        optimiser.step()

    return step


def model_step(
    method: DiscrepancyVAE, data: TrainingData, batch: int, mask: Tensor | None = None
) -> Callable[[], None]:
    """One step of a method as the training loop takes it, drawing and densifying included."""
    method._genes, method._perturbed = data.genes, data.seen_genes
    cells = PairedCells(data, data.seen_genes, ("all",))
    method.module = method._build(mask)
    optimiser = torch.optim.AdamW(method.module.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    random = Random.seeded(0, 1)
    rows = np.flatnonzero(np.asarray(data.perturbation != "control"))
    batches = iter(())

    def step() -> None:
        nonlocal batches
        chosen = next(batches, None)
        if chosen is None:
            batches = condition_batches(cells.condition, rows, batch, random.numpy)
            chosen = next(batches)
        optimiser.zero_grad(set_to_none=True)
        method._step(cells, chosen, random, 50).loss.backward()
        optimiser.step()

    return step


def measure(steps: list[Callable[[], None]], batch: int, seconds: float) -> list[float]:
    """Cells per second of each step, taking turns so that a busy machine slows all alike."""
    spent, done = [0.0] * len(steps), 0
    for step in steps:
        step()
    while sum(spent) < seconds * len(steps):
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step()
            spent[i] += time.perf_counter() - start
        done += 1
    return [done * batch / t for t in spent]


def compare(data: TrainingData, n_sets: int, batch: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Cells per second of roofline and method, by method; the two take turns."""
    mask = (torch.rand(n_sets, len(data.genes), generator=torch.Generator().manual_seed(0)) < 0.02).float()
    steps = {
        "discrepancy-VAE": (bare_step(data, 128, batch), model_step(DiscrepancyVAE(), data, batch)),
        "SENA": (bare_step(data, n_sets, batch), model_step(Sena(), data, batch, mask)),
    }
    return {name: tuple(measure(list(pair), batch, seconds)) for name, pair in steps.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--sets", type=int, default=400, help="gene sets of SENA")
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'training, cells/s':34s}{'bare net':>10s}{'ours':>10s}{'share':>8s}{'target':>8s}")
    for batch in arguments.batch:
        n_singles = max(1, min(100, arguments.cells // (3 * batch)))  # a batch holds cells of one condition
        data = make_cells(arguments.cells, arguments.genes, n_singles=n_singles)
        for name, (bare, ours) in compare(data, arguments.sets, batch, arguments.seconds).items():
            print(f"{f'{name}, batch {batch}':34s}{bare:10,.0f}{ours:10,.0f}{ours / bare:8.0%}{SHARE:8.0%}")
            if (name, batch) in CELLS_PER_SECOND:
                print(f"{'  target on two idle cores':34s}{'':10s}{CELLS_PER_SECOND[name, batch]:10,.0f}")


if __name__ == "__main__":
    main()
