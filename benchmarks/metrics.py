"""Time and memory of all metrics at the size of the Norman doubles: 131 perturbations × 5,000 genes × 100 cells each.

python benchmarks/metrics.py [--references]
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import EvaluationSpec
from perturbed.data.contracts import Features, Prediction, Split, read_split, write_features, write_h5ad, write_split
from perturbed.evaluation.evaluate import evaluate
from perturbed.evaluation.references import score_references
from perturbed.names import CONTROL, join_genes

N_TEST, N_TRAIN, N_CELLS, N_CONTROL, N_GENES, DENSITY, N_PCS = 131, 105, 100, 4000, 5000, 0.1, 50
TARGET_S, TARGET_GB = 90.0, 3.0


def write_inputs(folder: Path, rng: np.random.Generator) -> list[str]:
    """Sparse cells without structure, a split and features; the names of the test perturbations."""
    genes = [f"g{i}" for i in range(N_GENES)]
    singles = genes[:N_TRAIN]
    doubles = [join_genes(pair) for pair in itertools.pairwise(genes[: N_TEST + 1])]
    names = np.array([CONTROL] * N_CONTROL + [p for p in [*singles, *doubles] for _ in range(N_CELLS)])
    parts = np.where(np.isin(names, doubles), "test", "train")
    parts[: N_CONTROL // 2] = "test"
    matrix = sparse.random(len(names), N_GENES, density=DENSITY, format="csr", dtype=np.float32, random_state=rng)
    matrix.data = np.log1p(5 * matrix.data)
    obs = pd.DataFrame({"perturbation": names, "context": "all", "n_perturbed": 1})
    obs.index = [f"cell{i}" for i in range(len(names))]
    var = pd.DataFrame({"gene_id": genes, "symbol": genes}, index=genes)
    write_h5ad(folder / "prepared.h5ad", anndata.AnnData(matrix, obs=obs, var=var, uns={"perturbed": {"values": "x"}}))
    table = pd.DataFrame({"perturbation": names, "part": parts, "subgroup": ""}, index=obs.index)
    write_split(folder / "split.csv", Split(table, {"dataset": "bench", "split": "double", "fold": 0}))
    loadings = np.linalg.qr(rng.normal(size=(N_GENES, N_PCS)))[0]
    columns = {f"pc{i + 1}": loadings[:, i] for i in range(N_PCS)}
    features = pd.DataFrame({"mean": 0.1, "sd": 1.0, **columns}, index=pd.Index(genes, name="gene"))
    sha256 = read_split(folder / "split.csv").header["sha256"]
    write_features(folder / "features.csv", Features(features, {"split_sha256": sha256}))
    return doubles


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def report(name: str, seconds: float, before: float, target_s: float | None) -> None:
    """One row of the table."""
    target = f"≤ {target_s:.0f} s, ≤ {TARGET_GB:.0f} GB" if target_s else "–"
    print(f"{name:<42} {target:<18} {seconds:6.1f} s  {peak_gb():5.2f} GB (before: {before:.2f} GB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", action="store_true", help="measure floors and ceilings too (10 halves)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    spec = EvaluationSpec()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:  # so that the peak is evaluate's own
            doubles = other.submit(write_inputs, folder, rng).result()
        prepared, split, features = (folder / f for f in ("prepared.h5ad", "split.csv", "features.csv"))
        mean = rng.gamma(0.3, 0.3, (N_TEST, N_GENES)).astype(np.float32)
        prediction = Prediction(mean, tuple(f"g{i}" for i in range(N_GENES)), tuple(doubles), ("all",) * N_TEST)
        print(f"{'what':<42} {'target':<18} measured")
        before, start = peak_gb(), time.perf_counter()
        table = evaluate(prepared, split, prediction, spec, features=features)
        report(f"all {table['metric'].nunique()} metrics, {N_TEST} × {N_GENES} × {N_CELLS}",
               time.perf_counter() - start, before, TARGET_S)  # fmt: skip
        if arguments.references:
            before, start = peak_gb(), time.perf_counter()
            score_references(prepared, split, features, spec)
            report(f"references, {spec.n_halves} halves", time.perf_counter() - start, before, None)


if __name__ == "__main__":
    main()
