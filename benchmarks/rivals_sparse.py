"""Training speed of SAMS-VAE and sVAE+ beside their roofline: a bare net of the same shapes, in one run, taking turns.

The bare net encodes the cells, decodes them, goes backward and takes an Adam step in float32 on the squared error, with
a fixed batch already in memory: no sampling, no densifying, no shifts, no KL, no count likelihood.

    python benchmarks/rivals_sparse.py [--threads 2] [--cells 10000] [--genes 5000] [--seconds 8]
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
from perturbed.models.sams_vae import SAMSVAE, SAMSVAEParams
from perturbed.models.sparse_shift import SparseShiftVAE
from perturbed.models.svae_plus import SVAEPlus, SVAEPlusParams
from perturbed.training import Random

TARGET = 0.33
N_LATENT, N_HIDDEN = 200, 400


def make_cells(n_cells: int, n_genes: int, density: float = 0.11, n_singles: int = 100) -> TrainingData:
    """Random sparse cells with small counts where they express, a tenth of them control."""
    rng = np.random.default_rng(0)
    x = sparse.random(n_cells, n_genes, density, "csr", dtype=np.float32, random_state=rng)
    counts = x.copy()
    counts.data = rng.geometric(0.6, len(counts.data)).astype(np.float32)
    names = np.where(rng.random(n_cells) < 0.1, "control", rng.choice([f"G{i}" for i in range(n_singles)], n_cells))
    return TrainingData(
        x, names, np.full(n_cells, "all"), np.zeros(n_cells, bool), tuple(f"G{i}" for i in range(n_genes)),
        np.zeros(n_genes), np.zeros((n_genes, 2)), counts, np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
    )  # fmt: skip


def bare_step(data: TrainingData, batch: int) -> Callable[[], None]:
    """One step of the bare net."""
    n_genes = len(data.genes)
    encoder, heads = build_mlp((n_genes, N_HIDDEN), last=True), nn.Linear(N_HIDDEN, 2 * N_LATENT)
    decoder = build_mlp((N_LATENT, N_HIDDEN, n_genes))
    parameters = [*encoder.parameters(), *heads.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, fused=True)
    x = torch.from_numpy(data.X[:batch].toarray())

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        (decoder(heads(encoder(x))[:, :N_LATENT]) - x).square().mean().backward()
        optimiser.step()

    return step


def model_step(method: SparseShiftVAE, data: TrainingData, batch: int) -> Callable[[], None]:
    """One step of a method as the training loop takes it, densifying included."""
    cells = PairedCells(data, data.seen_genes, ("all",), counts=method.needs_counts)
    method.module = method.build_module(len(data.genes), len(data.seen_genes))
    optimiser = torch.optim.AdamW(method.module.parameters(), weight_decay=0.0, fused=True)
    random = Random.seeded(0, 1)
    rows = np.arange(len(data.perturbation))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        chosen = random.numpy.choice(rows, batch, replace=False)
        method._step(cells, chosen, random, 50, len(rows)).loss.backward()
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
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = make_cells(arguments.cells, arguments.genes)
    shape = {"n_latent": N_LATENT, "n_hidden": N_HIDDEN}
    methods = {
        f"{cls.title}, {likelihood}": cls(params(likelihood=likelihood, **shape))
        for cls, params in ((SAMSVAE, SAMSVAEParams), (SVAEPlus, SVAEPlusParams))
        for likelihood in ("nb", "gaussian")
    }
    print(
        f"{f'training, cells/s, batch {arguments.batch}':34s}{'bare net':>10s}{'ours':>10s}{'share':>8s}{'target':>8s}"
    )
    for name, method in methods.items():
        steps = [bare_step(data, arguments.batch), model_step(method, data, arguments.batch)]
        bare, ours = measure(steps, arguments.batch, arguments.seconds)
        print(f"{name:34s}{bare:10,.0f}{ours:10,.0f}{ours / bare:8.0%}{TARGET:8.0%}")


if __name__ == "__main__":
    main()
