"""Small prepared files and splits for the tests of the evaluation, with the dense arrays that slow references need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.contracts import Prediction, Split, write_h5ad, write_split
from perturbed.names import CONTROL, genes_of

META = {"dataset": "toy", "split": "zero_shot", "fold": 0, "seed": 0, "spec": {}}


@dataclass(frozen=True)
class World:
    """Files of one split, and what is in them."""

    prepared: Path
    split: Path
    X: np.ndarray
    table: pd.DataFrame  # index cell; perturbation, context, part, subgroup
    genes: list[str]

    def cells(self, perturbation: str, part: str | tuple[str, ...], context: str = "all") -> np.ndarray:
        parts = (part,) if isinstance(part, str) else part
        t = self.table
        return self.X[((t.perturbation == perturbation) & t.part.isin(parts) & (t.context == context)).to_numpy()]

    def tested(self, context: str = "all") -> list[str]:
        t = self.table
        chosen = t[(t.part == "test") & (t.perturbation != CONTROL) & (t.context == context)]
        return sorted(chosen.perturbation.unique())

    def control(self, context: str = "all") -> np.ndarray:
        return self.cells(CONTROL, ("train", "val"), context).mean(axis=0, dtype=np.float64)

    def trained_mean(self, context: str = "all") -> np.ndarray:
        t = self.table
        inside = t[t.part.isin(["train", "val"]) & (t.perturbation != CONTROL) & (t.context == context)]
        means = [self.cells(p, ("train", "val"), context).mean(0, dtype=float) for p in inside.perturbation.unique()]
        return np.mean(means, axis=0)

    def predict(self, **means: np.ndarray) -> Prediction:
        return prediction_of(means, self.genes)

    def additive(self, context: str = "all") -> Prediction:
        c = self.control(context)
        single = {
            p: self.cells(p, ("train", "val"), context).mean(axis=0, dtype=np.float64)
            for p in {g for d in self.tested(context) for g in genes_of(d)}
        }
        return prediction_of(
            {d: c + sum(single[g] - c for g in genes_of(d)) for d in self.tested(context)}, self.genes, context
        )


def prediction_of(means: dict[str, np.ndarray], genes: list[str], context: str = "all", **fields: object) -> Prediction:
    names = tuple(means)
    mean = np.stack([np.asarray(means[name]) for name in names])
    return Prediction(mean, tuple(genes), names, (context,) * len(names), **fields)  # type: ignore[arg-type]


def write_world(folder: Path, X: np.ndarray, table: pd.DataFrame, genes: list[str]) -> World:
    """Write prepared.h5ad and split.csv of the cells."""
    folder.mkdir(parents=True, exist_ok=True)
    obs = table[["perturbation", "context"]].assign(n_perturbed=[len(genes_of(p)) for p in table.perturbation])
    var = pd.DataFrame({"gene_id": genes, "symbol": genes}, index=pd.Index(genes, dtype=str))
    X = np.asarray(X, dtype=np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(X), obs=obs, var=var, uns={"perturbed": {"values": "lognorm"}})
    write_h5ad(folder / "prepared.h5ad", adata)
    write_split(folder / "split.csv", Split(table[["perturbation", "part", "subgroup"]], META))
    return World(folder / "prepared.h5ad", folder / "split.csv", X, table, genes)


def make_world(
    folder: Path,
    *,
    seed: int = 0,
    n_cells: int = 24,
    n_control: int = 40,
    n_genes: int = 60,
    control_test: float = 0.5,
    contexts: tuple[str, ...] = ("all",),
    effect: float = 1.0,
) -> World:
    """Eight singles in training, six doubles in the test part; sparse non-negative values; additive effects.

    Gene `g0` … are measured, and `g0` … `g7` are the perturbed ones too.
    """
    rng = np.random.default_rng([seed, 77])
    genes = [f"g{i}" for i in range(n_genes)]
    singles = [f"g{i}" for i in range(8)]
    doubles = ["g0+g1", "g0+g2", "g1+g3", "g2+g4", "g3+g5", "g6+g7"]
    base = rng.gamma(1.0, 1.0, n_genes)
    shift = {s: effect * rng.normal(0, 1, n_genes) * (rng.random(n_genes) < 0.4) for s in singles}
    rows, values = [], []
    for context in contexts:
        own = base + (0 if context == contexts[0] else rng.gamma(1.0, 0.5, n_genes))
        for name in [CONTROL, *singles, *doubles]:
            n = n_control if name == CONTROL else n_cells
            mean = own + sum((shift[g] for g in genes_of(name)), np.zeros(n_genes))
            values.append(np.maximum(rng.normal(mean, 0.7, (n, n_genes)), 0))
            for i in range(n):
                if name == CONTROL:
                    part = "test" if i < control_test * n else ("val" if i % 10 == 0 else "train")
                elif name in doubles:
                    part = "test"
                else:
                    part = "val" if i % 10 == 0 else "train"
                subgroup = "combo_seen2" if name in doubles else ""
                rows.append((name, context, part, subgroup))
    table = pd.DataFrame(rows, columns=["perturbation", "context", "part", "subgroup"])
    table.index = pd.Index([f"cell{i:05d}" for i in rng.permutation(len(table))])
    order = rng.permutation(len(table))
    return write_world(folder, np.vstack(values)[order], table.iloc[order], genes)
