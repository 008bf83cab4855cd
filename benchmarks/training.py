"""Training speed of PerturbedVAE beside its roofline: a bare net of the same shapes on the same machine, in one run.

The bare net encodes the cells and as many control cells, decodes the cells, goes backward and takes an Adam step in
float32, with a fixed batch already in memory: no sampling, no densifying, no causal model, no KL.

    python benchmarks/training.py [--threads 2] [--cells 10000] [--genes 5000] [--seconds 8]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import nn

from perturbed.models.base import TrainingData
from perturbed.models.cells import PairedCells
from perturbed.models.nn.mlp import build_mlp
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams
from perturbed.models.perturbedvae_module import PerturbedVAEModule
from perturbed.training import Random

TARGETS = {512: 0.60, 64: None}


def make_cells(n_cells: int, n_genes: int, density: float = 0.11, n_singles: int = 100) -> TrainingData:
    """Random sparse cells, a tenth of them control."""
    rng = np.random.default_rng(0)
    x = sparse.random(n_cells, n_genes, density, "csr", dtype=np.float32, random_state=rng)
    singles = [f"G{i}" for i in range(n_singles)]
    names = np.where(rng.random(n_cells) < 0.1, "control", rng.choice(singles, n_cells))
    return TrainingData(
        x, names, np.full(n_cells, "all"), np.zeros(n_cells, bool), tuple(f"G{i}" for i in range(n_genes)),
        np.zeros(n_genes), np.zeros((n_genes, 2)),
    )  # fmt: skip


def bare_step(data: TrainingData, batch: int) -> Callable[[], None]:
    """One step of the bare net."""
    n_genes = len(data.genes)
    encoder, heads = build_mlp((n_genes, 256), last=True), nn.Linear(256, 210)
    decoder = build_mlp((105, 256, n_genes))
    parameters = [*encoder.parameters(), *heads.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, fused=True)
    x = torch.from_numpy(data.X[: 2 * batch].toarray())

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        latent = heads(encoder(x))[:batch, :105]
        (decoder(latent) - x[:batch]).square().mean().backward()
        optimiser.step()

    return step


def model_step(data: TrainingData, batch: int, **options: object) -> Callable[[], None]:
    """One step of PerturbedVAE as the training loop takes it, drawing and densifying included."""
    method = PerturbedVAE(PerturbedVAEParams(batch_size=batch, **options))  # type: ignore[arg-type]
    cells = PairedCells(data, data.seen_genes, ("all",), counts=method.params.likelihood == "nb")
    method.module = PerturbedVAEModule(len(data.genes), len(data.seen_genes), method.params)
    parameters = [p for p in method.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    random = Random.seeded(0, 1)
    rows = np.arange(len(data.perturbation))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        method._step(cells, random.numpy.choice(rows, batch, replace=False), random, 50).loss.backward()
        optimiser.step()

    return step


def measure(steps: list[Callable[[], None]], batch: int, seconds: float) -> list[float]:
    """Cells per second of each, taking turns so that a busy machine slows all alike."""
    spent, done = [0.0] * len(steps), [0] * len(steps)
    for step in steps:
        step()
    while sum(spent) < seconds * len(steps):
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step()
            spent[i] += time.perf_counter() - start
            done[i] += 1
    return [n * batch / t for n, t in zip(done, spent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = make_cells(arguments.cells, arguments.genes)
    print(f"{'training, cells/s':34s}{'bare net':>10s}{'ours':>10s}{'share':>8s}{'target':>8s}")
    for batch, target in TARGETS.items():
        bare, ours = measure([bare_step(data, batch), model_step(data, batch)], batch, arguments.seconds)
        wanted = f"{target:.0%}" if target else "-"
        print(f"{f'PerturbedVAE, batch {batch}':34s}{bare:10,.0f}{ours:10,.0f}{ours / bare:8.0%}{wanted:>8s}")


if __name__ == "__main__":
    main()
