"""Preparation and training of data that outgrow memory: 1,000,000 cells × 5,000 genes on two cores within 8 GB.

    python benchmarks/scale.py --folder FOLDER [--cells 1000000] [--steps 600] [--memory-gb 3]

Counts are made by blocks of cells (10 % of them above zero, every perturbed gene shifts 2 % of the genes), then every
stage runs in a process of its own, through the command line, with its wall time, the time it had of the processors
(which a busy machine changes little) and the largest resident memory that the kernel saw. `--memory-gb` is the budget
beyond which stages stream; lower it with fewer cells to see the same code on a smaller file. The folder is left as it
is, for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

BLOCK = 2_000
N_SINGLES, N_DOUBLES = 200, 60
CONTROL_SHARE = 0.1
LIMIT_GB = 8.0
BYTES_ON_DISK = 5_000
"""Per cell of 5,000 genes, all files together."""
SPLIT = {"kind": "unseen_combo", "train_fraction": 0.0, "val_fraction": 0.02, "control_test_fraction": 0.1}
FEATURES = {"n_hvg": "all", "n_pcs": 50}


# --- the cells ----------------------------------------------------------------------------------------------------


def make_file(path: Path, n_cells: int, n_genes: int, density: float = 0.10) -> None:
    """Write raw counts by blocks of cells, so that making them takes little memory."""
    import anndata
    import h5py

    from perturbed.data.prepare_streamed import CsrWriter

    rng = np.random.default_rng(0)
    genes = [f"g{i:05d}" for i in range(n_genes)]
    names = [*genes[:N_SINGLES], *(f"{genes[i]}+{genes[i + 1]}" for i in range(N_DOUBLES))]
    label = np.where(rng.random(n_cells) < CONTROL_SHARE, len(names), rng.integers(0, len(names), n_cells))
    obs = pd.DataFrame({"perturbation": pd.Categorical.from_codes(label, [*names, "control"])})
    obs.index = pd.Index([f"cell{i:08d}" for i in range(n_cells)])
    anndata.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(genes))).write_h5ad(path)
    base = rng.gamma(0.5, 2 * density, n_genes).astype(np.float32)
    effect = np.ones((len(names) + 1, n_genes), dtype=np.float32)
    for row, name in enumerate(names):
        for gene in name.split("+"):
            shifted = np.random.default_rng([1, genes.index(gene)]).choice(n_genes, n_genes // 50, replace=False)
            effect[row, shifted] *= 3.0 if genes.index(gene) % 2 else 0.3
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        writer = CsrWriter(file.create_group("X"), n_genes)
        for start in range(0, n_cells, BLOCK):
            rows = label[start : start + BLOCK]
            rate = base * effect[rows] * rng.gamma(6, 1 / 6, (len(rows), 1)).astype(np.float32)
            found = rng.random(rate.shape, dtype=np.float32) < -np.expm1(-1.35 * rate)
            block = sparse.csr_matrix(found, dtype=np.float32)
            block.data = rng.geometric(0.55, block.nnz).astype(np.float32)
            writer.append(block)
        writer.finish()


# --- the stages ---------------------------------------------------------------------------------------------------


def stages(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Command line of every stage, by name."""
    at = {
        name: str(folder / name) for name in ("raw.h5ad", "prepared.h5ad", "split.csv", "features.csv", "leakage.json")
    }
    card = json.dumps({"source": {"kind": "path", "path": at["raw.h5ad"]}, "prepare": {"min_counts": 20}})
    method = {
        "title": "PerturbedVAE",
        "implementation": "perturbed.models.perturbedvae:PerturbedVAE",
        "params": {"batch_size": 512, "epochs": 1, "max_steps": options.steps, "n_samples": 0},
    }
    prepared = ["--prepared", at["prepared.h5ad"]]
    fold = [*prepared, "--split", at["split.csv"]]
    fit = [*fold, "--features", at["features.csv"]]
    budget = ["--memory-gb", str(options.memory_gb)]
    prediction, scores = str(folder / "prediction.h5ad"), str(folder / "scores.parquet")
    return {
        "prepare": ["prepare", "--dataset", "scale", "--raw", at["raw.h5ad"], "--card", card,
                    "--out", at["prepared.h5ad"], *budget],
        "split": ["split", "--dataset", "scale", "--name", "doubles", *prepared, "--spec", json.dumps(SPLIT),
                  "--out", at["split.csv"]],
        "features": ["features", *fold, "--spec", json.dumps(FEATURES), "--out", at["features.csv"]],
        "check-leakage": ["check-leakage", *fit, "--out", at["leakage.json"]],
        "fit": ["fit", *fit, "--leakage", at["leakage.json"], "--method", json.dumps(method), "--device", "cpu",
                "--threads", str(options.threads), "--processes", str(options.processes),
                "--out", str(folder / "model"), *budget],
        "predict": ["predict", "--model", str(folder / "model"), *fold, "--method", "perturbedvae",
                    "--out", prediction],
        "evaluate": ["evaluate", "--truth", at["prepared.h5ad"], "--split", at["split.csv"], "--prediction", prediction,
                     "--features", at["features.csv"], "--out", scores,
                     "--spec", json.dumps({"metrics": ["pearson_delta_ctrl", "rmse_relative"]})],
    }  # fmt: skip


def run_stage(arguments: list[str]) -> None:
    """One stage in this process; the training loop's own time is told apart from that of reading and saving."""
    from perturbed import cli, training

    spent: dict[str, float] = {}
    worked: dict[str, float] = {}

    def timed(name: str) -> Callable[..., Any]:
        original = getattr(training._Loop, name)

        def call(*given: Any) -> Any:
            start, busy = time.monotonic(), time.process_time()
            try:
                return original(*given)
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - start
                worked[name] = worked.get(name, 0.0) + time.process_time() - busy
                steps = given[0].steps
                print(f"timing {name} {spent[name]:.3f} {worked[name]:.3f} {steps}", file=sys.stderr, flush=True)

        return call

    for name in ("_train_epoch", "_validate"):
        setattr(training._Loop, name, timed(name))
    sys.argv = ["perturbed", *arguments]
    cli.main()


def measure(call: list[str], log: Path, threads: int) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak GB (10⁹ bytes) of a process; those that it starts are not in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with log.open("w") as text:
        process = subprocess.Popen(call, env=environment, stdout=text, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(call[:4])} … failed; {log}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def read_speed(log: Path, n_train: int, batch: int = 512) -> str:
    """Cells per second of the training loop, from the times that the stage left in its log."""
    for line in log.read_text().splitlines():
        if line.startswith("timing _train_epoch"):
            seconds, busy, steps = map(float, line.split()[2:])
            n_cells = min(steps * batch, n_train)
            return f"{n_cells / seconds:,.0f} cells/s, {n_cells / busy:,.0f} a processor second ({steps:.0f} steps)"
    return ""


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        run_stage(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; some 5 GB for a million cells")
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=600, help="training steps of 512 cells")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--memory-gb", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", help="these stages only, on the files of an earlier run")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    needed = options.cells * options.genes / 5_000 * BYTES_ON_DISK
    if shutil.disk_usage(folder).free < needed and not options.only:
        sys.exit(f"{folder}: {needed / 1e9:.0f} GB are needed; give another --folder, or fewer --cells")
    print(f"{options.cells:,} cells x {options.genes:,} genes, memory budget {options.memory_gb:g} GB, "
          f"{options.threads} threads, load of the machine {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    raw = folder / "raw.h5ad"
    if not options.only:
        started = time.monotonic()
        make_file(raw, options.cells, options.genes)
        print(f"made raw.h5ad in {time.monotonic() - started:.0f} s, {raw.stat().st_size / 1e9:.2f} GB", flush=True)
    print(f"{'stage':16s}{'seconds':>10s}{'processor':>11s}{'peak GB':>10s}{'target':>10s}", flush=True)
    for name, arguments in stages(folder, options).items():
        if options.only and name not in options.only:
            continue
        log = folder / f"{name}.log"
        call = [sys.executable, __file__, "--stage", *arguments]
        seconds, busy, peak = measure(call, log, options.threads)
        more = read_speed(log, options.cells) if name == "fit" else ""
        print(f"{name:16s}{seconds:10.0f}{busy:11.0f}{peak:10.2f}{f'<= {LIMIT_GB:g}':>10s}  {more}", flush=True)


if __name__ == "__main__":
    main()
