"""Time and memory of the classical rivals at the size of Norman: 100,000 cells × 5,000 genes, 236 conditions.

python benchmarks/classical.py [--cells N] [--threads N]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from scipy import sparse

from perturbed.models.base import FitRun, Method, TrainingData
from perturbed.models.baselines import Additive
from perturbed.models.latent_additive import PcaAdditive
from perturbed.models.regressors import LinearElasticNet, NearestNeighbours, RandomForest
from perturbed.names import CONTROL, join_genes

N_SINGLES, N_DOUBLES, N_GENES, N_DETECTED, N_CONTROL = 105, 131, 5000, 500, 8000
TARGET_S = 600.0


def make_cells(n_cells: int) -> TrainingData:
    """Sparse cells with an effect for each gene; 10 % of the values are not zero."""
    rng = np.random.default_rng(0)
    genes = [f"g{i:04d}" for i in range(N_GENES)]
    pairs = rng.permutation(N_SINGLES * (N_SINGLES - 1) // 2)[:N_DOUBLES]
    first, second = np.triu_indices(N_SINGLES, 1)
    conditions = [*genes[:N_SINGLES], *(join_genes([genes[first[i]], genes[second[i]]]) for i in pairs)]
    per_condition = (n_cells - N_CONTROL) // len(conditions)
    names = np.array([CONTROL] * N_CONTROL + [name for name in conditions for _ in range(per_condition)], dtype=object)
    patterns = np.sort(np.stack([rng.permutation(N_GENES)[:N_DETECTED] for _ in range(500)]), axis=1).astype(np.int32)
    which = rng.integers(len(patterns), size=len(names))
    values = rng.gamma(4.0, 0.3, size=len(names) * N_DETECTED).astype(np.float32)
    indptr = np.arange(len(names) + 1) * N_DETECTED
    X = sparse.csr_matrix((values, patterns[which].ravel(), indptr.astype(np.int32)), shape=(len(names), N_GENES))
    blank = np.zeros(len(names), dtype=bool)
    context = np.full(len(names), "all", dtype=object)
    return TrainingData(X, names, context, blank, tuple(genes), np.zeros(N_GENES), np.zeros((N_GENES, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    data = make_cells(arguments.cells)
    targets = [(f"g{i:04d}+g{i + 1:04d}", "all") for i in range(N_SINGLES - 1)]
    methods: dict[str, Method] = {
        "additive": Additive(),
        "knn": NearestNeighbours(),
        "elastic_net": LinearElasticNet(),
        "elastic_net, all genes": LinearElasticNet(LinearElasticNet.Params(n_components=None)),
        "random_forest": RandomForest(),
        "random_forest, all genes": RandomForest(RandomForest.Params(n_components=None)),
        "pca_additive": PcaAdditive(PcaAdditive.Params(n_samples=0)),
    }
    print(f"{data.X.shape[0]} cells × {N_GENES} genes, {N_SINGLES + N_DOUBLES} conditions; target ≤ {TARGET_S:.0f} s")
    print(f"{'method':<26}{'fit':>10}{'predict ' + str(len(targets)):>14}{'peak':>10}")
    for name, method in methods.items():
        start = time.perf_counter()
        method.fit(data, FitRun(threads=arguments.threads, progress=False))
        fitted = time.perf_counter()
        method.predict(targets)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name:<26}{fitted - start:>8.1f} s{time.perf_counter() - fitted:>12.1f} s{peak:>7.1f} GB", flush=True)


if __name__ == "__main__":
    main()
