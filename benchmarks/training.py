"""Training speed of the torch methods, each beside its roofline, on the same machine in the same minute.

The roofline is a bare net of the method's shapes: it encodes the cells (and as many control cells where the method
does), decodes the cells, goes backward and takes an Adam step in float32 on a fixed batch already in memory: no
sampling, no densifying, no causal model, no KL, squared error only. The method runs through its own `fit`, epoch by
epoch, all included; between its epochs the bare net takes its turn, so that a busy machine slows both alike. The first
epoch is left out.

    python benchmarks/training.py [NAME ...] [--threads 2] [--cells 10000] [--genes 5000] [--seconds 8]
    python benchmarks/training.py --memory     # 100,000 cells x 5,000 genes: peak memory and speed

To add a method, add a line to `CASES`.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import nn

from perturbed.models.base import FitRun, TrainingData, build, load_method_spec
from perturbed.models.nn.mlp import build_mlp

METHODS = Path(__file__).resolve().parent.parent / "config" / "methods"
MEMORY_TARGET = 6.0


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    method: str
    """Name of the file in `config/methods`."""
    batch: int
    counts: bool = False
    """Whether the data hold counts."""
    hidden: int = 256
    """Width of the bare net."""
    latent: int = 105
    controls: bool = True
    """Whether the bare net encodes as many control cells, too."""
    share: float | None = None
    """Least share of the roofline."""
    speed: float | None = None
    """Least cells/s on two idle cores."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the method file."""
    silent: bool = False
    """Whether another library trains it, which says nothing between epochs."""


CASES = [
    Case("perturbedvae", 512, share=0.60),
    Case("perturbedvae", 64),
    Case("perturbedvae_mmd", 512, share=0.33),
    Case("perturbedvae_nb", 512, counts=True, hidden=128, speed=7_000, params={"n_hidden": 128}),
    Case("scvi_additive", 512, counts=True, hidden=128, latent=10, controls=False, share=0.33, silent=True),
]
SILENT_EPOCHS = 3
"""Further epochs by which the fit of a silent method is made longer."""


class _Enough(Exception):
    pass


def make_cells(
    n_cells: int, n_genes: int, *, density: float = 0.11, n_singles: int = 100, counts: bool = False
) -> TrainingData:
    """Random sparse cells, a tenth of them control; built in blocks, for the largest case is of 5e8 entries."""
    rng = np.random.default_rng(0)
    blocks = []
    for start in range(0, n_cells, 2_000):
        n = min(2_000, n_cells - start)
        mask = rng.random((n, n_genes), dtype=np.float32) < density
        block = sparse.csr_matrix(mask, dtype=np.float32)
        block.data = 1 + np.floor(rng.exponential(1.5, block.nnz)).astype(np.float32)
        blocks.append(block)
    raw = sparse.vstack(blocks, format="csr", dtype=np.float32)
    del blocks
    library = np.asarray(raw.sum(axis=1), dtype=np.float64).ravel()
    x = raw.copy() if counts else raw
    x.data = np.log1p(x.data * np.repeat((1e4 / library).astype(np.float32), np.diff(x.indptr)))
    singles = [f"G{i}" for i in range(n_singles)]
    names = np.where(rng.random(n_cells) < 0.1, "control", rng.choice(singles, n_cells))
    return TrainingData(
        x, names, np.full(n_cells, "all"), np.zeros(n_cells, bool), tuple(f"G{i}" for i in range(n_genes)),
        np.zeros(n_genes), np.zeros((n_genes, 2)), counts=raw if counts else None, library=library,
    )  # fmt: skip


def bare_step(data: TrainingData, case: Case) -> Callable[[], None]:
    """One step of the bare net."""
    n_genes, n = len(data.genes), case.batch
    encoder, heads = build_mlp((n_genes, case.hidden), last=True), nn.Linear(case.hidden, 2 * case.latent)
    decoder = build_mlp((case.latent, case.hidden, n_genes))
    parameters = [*encoder.parameters(), *heads.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, fused=True)
    x = torch.from_numpy(data.X[: (2 if case.controls else 1) * n].toarray())

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        latent = heads(encoder(x))[:n, : case.latent]
        (decoder(latent) - x[:n]).square().mean().backward()
        optimiser.step()

    return step


def measure(case: Case, data: TrainingData, seconds: float) -> tuple[float, float]:
    """Cells per second of the bare net and of the method's own training loop, epoch about epoch."""
    bare = bare_step(data, case)
    bare()
    spent = {"bare": 0.0, "ours": 0.0}
    done = {"bare": 0, "ours": 0}
    since: list[float] = []

    def after_epoch(row: Mapping[str, float]) -> None:
        now = time.perf_counter()
        if since:
            spent["ours"] += now - since[-1]
            done["ours"] += len(data.perturbation)
        turn = time.perf_counter()
        while time.perf_counter() - turn < (now - since[-1] if since else 0.5):
            bare()
            done["bare"] += case.batch
        spent["bare"] += time.perf_counter() - turn
        if spent["ours"] > seconds:
            raise _Enough
        since.append(time.perf_counter())

    options = {"batch_size": case.batch, "epochs": 10_000, "patience": None, **case.params}
    method = build(load_method_spec(case.method, [METHODS]), options)
    with contextlib.suppress(_Enough):
        method.fit(data, FitRun(history=after_epoch, progress=False))
    return done["bare"] / spent["bare"], done["ours"] / spent["ours"]


def measure_silent(case: Case, data: TrainingData, seconds: float) -> tuple[float, float]:
    """The same for a silent method: what further epochs take, with the bare net in between."""
    bare, spent = bare_step(data, case), {}
    bare()
    for epochs in (1, 1, 1 + SILENT_EPOCHS):  # the first pays for imports
        options = {"batch_size": case.batch, "epochs": epochs, "patience": None, **case.params}
        method = build(load_method_spec(case.method, [METHODS]), options)
        start = time.perf_counter()
        method.fit(data, FitRun(progress=False))
        spent[epochs] = time.perf_counter() - start
        turn, done = time.perf_counter(), 0
        while time.perf_counter() - turn < seconds:
            bare()
            done += case.batch
        speed = done / (time.perf_counter() - turn)
    return speed, SILENT_EPOCHS * len(data.perturbation) / (spent[1 + SILENT_EPOCHS] - spent[1])


def measure_memory(n_steps: int) -> None:
    """Train PerturbedVAE on 100,000 x 5,000 cells for some steps and print the peak memory of the process."""
    data = make_cells(100_000, 5_000, density=0.10)
    start = time.perf_counter()
    method = build(load_method_spec("perturbedvae", [METHODS]), {"batch_size": 512, "max_steps": n_steps, "epochs": 99})
    method.fit(data, FitRun(progress=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"100,000 x 5,000, {data.X.nnz / 5e8:.0%} non-zero, {n_steps} steps of 512: peak {peak:.2f} GB "
          f"(target {MEMORY_TARGET:g}), fit {time.perf_counter() - start:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="methods to time; all of the table if none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on each line")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--steps", type=int, default=300, help="steps of the memory measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        measure_memory(arguments.steps)
        return
    data: dict[bool, TrainingData] = {}
    print(f"{'training, cells/s':34s}{'bare net':>10s}{'ours':>10s}{'share':>8s}{'target':>10s}")
    for case in CASES:
        if arguments.methods and case.method not in arguments.methods:
            continue
        if case.counts not in data:
            data[case.counts] = make_cells(arguments.cells, arguments.genes, counts=case.counts)
        bare, ours = (measure_silent if case.silent else measure)(case, data[case.counts], arguments.seconds)
        wanted = f"{case.share:.0%}" if case.share else f"{case.speed:,.0f}/s" if case.speed else "-"
        print(f"{f'{case.method}, batch {case.batch}':34s}{bare:10,.0f}{ours:10,.0f}{ours / bare:8.0%}{wanted:>10s}")


if __name__ == "__main__":
    main()
