"""Time and memory of `prepare` on 100,000 cells × 20,000 genes, 5 % dense.

Target: at most 2 GB above the loaded matrix and at most 3 minutes on one core. Run `python benchmarks/prepare.py`;
`--cells 10000` for a quick look. The file is made in a temporary folder, and each stage runs in its own process.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

BLOCK = 5_000
N_PERTURBATIONS = 200


def make_file(path: Path, n_cells: int, n_genes: int, density: float) -> None:
    """Write counts by blocks of cells, so that making the file needs little memory."""
    import anndata

    rng = np.random.default_rng(0)
    names = ["control", *(f"g{i:05d}" for i in range(N_PERTURBATIONS))]
    obs = pd.DataFrame({"perturbation": pd.Categorical(rng.choice(names, n_cells))})
    obs.index = pd.Index([f"cell{i:07d}" for i in range(n_cells)])
    var = pd.DataFrame(index=pd.Index([f"g{i:05d}" for i in range(n_genes)]))
    anndata.AnnData(obs=obs, var=var).write_h5ad(path)
    per_cell = rng.poisson(density * n_genes, n_cells).clip(1, n_genes)
    indptr = np.concatenate([[0], np.cumsum(per_cell)])
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        group.create_dataset("indptr", data=indptr.astype(np.int32))
        kinds = {"indices": np.int32, "data": np.float32}
        stored = {
            key: group.create_dataset(key, (int(indptr[-1]),), kind, chunks=(2**18,)) for key, kind in kinds.items()
        }
        for start in range(0, n_cells, BLOCK):
            rows = per_cell[start : start + BLOCK]
            indices = np.concatenate([np.sort(rng.choice(n_genes, n, replace=False)) for n in rows])
            place = slice(indptr[start], indptr[start] + len(indices))
            stored["indices"][place] = indices
            stored["data"][place] = rng.geometric(0.4, len(indices))


def load_only(path: Path) -> None:
    from perturbed.data.contracts import read_h5ad

    print(f"nnz {read_h5ad(path).X.nnz}", file=sys.stderr)


def prepare_all(path: Path) -> None:
    from perturbed.data.cards import Card
    from perturbed.data.contracts import write_h5ad
    from perturbed.data.prepare import prepare

    section = {"min_genes": 990, "min_counts": 500, "min_cells_per_perturbation": 5}  # drops cells, so rows are copied
    card = Card.model_validate({"source": {"kind": "path", "path": str(path)}, "prepare": section})
    write_h5ad(path.with_name("prepared.h5ad"), prepare(path, card, "benchmark"))


STEPS = {"load": load_only, "prepare": prepare_all}


def run_step(step: str, path: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of one step in a fresh process."""
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    call = [sys.executable, __file__, "--step", step, "--path", str(path)]
    done = subprocess.run(call, env=environment, check=True, capture_output=True, text=True)
    return time.monotonic() - started, float(done.stdout.split()[-1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step](options.path)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.h5ad"
        make_file(path, options.cells, options.genes, options.density)
        _, loaded = run_step("load", path)
        seconds, peak = run_step("prepare", path)
    size = f"{options.cells:,} cells x {options.genes:,} genes, {options.density:.0%} dense"
    print(f"{'prepare: ' + size:60s} {'target':>10s} {'measured':>10s}")
    print(f"{'seconds, reading and writing included':60s} {'<= 180':>10s} {seconds:10.1f}")
    print(f"{'GB above the process that only loads the matrix':60s} {'<= 2':>10s} {peak - loaded:10.2f}")
    print(f"{'GB peak of the whole process':60s} {'':>10s} {peak:10.2f}")


if __name__ == "__main__":
    main()
