"""A small world of counts for the tests of the data layer: few cells, few genes, known effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import FeatureSpec, SplitSpec, UnseenCombo
from perturbed.data.cards import Card
from perturbed.data.contracts import open_prepared, read_split, write_features, write_h5ad, write_split
from perturbed.data.features import compute_features
from perturbed.data.prepare import prepare
from perturbed.data.split import make_split

SINGLES = ("A", "B", "C", "D", "E", "F")
DOUBLES = ("A+B", "A+C", "B+C", "D+E", "C+F")


def card(**sections: Any) -> Card:
    """A card whose source is not read by the stages under test."""
    return Card.model_validate({"source": {"kind": "path", "path": "raw.h5ad"}, **sections})


def make_counts(
    conditions: Sequence[str] = ("control", *SINGLES, *DOUBLES),
    n_cells: int = 12,
    n_control: int = 20,
    n_genes: int = 50,
    contexts: Iterable[str] = ("all",),
    seed: int = 0,
) -> anndata.AnnData:
    """Poisson counts; each perturbed gene scales the rates of five others, shuffled cells."""
    rng = np.random.default_rng(seed)
    names = [*SINGLES, *(f"g{i:03d}" for i in range(n_genes - len(SINGLES)))]
    base = rng.gamma(0.5, 2.0, size=n_genes)
    effect = {gene: np.ones(n_genes) for gene in SINGLES}
    for gene in SINGLES:
        effect[gene][rng.choice(n_genes, 5, replace=False)] *= rng.choice([0.2, 5.0], 5)
    rows, labels, where = [], [], []
    for context in contexts:
        for condition in conditions:
            rate = base * np.prod([effect[g] for g in condition.split("+") if g in effect], axis=0)
            n = n_control if condition == "control" else n_cells
            rows.append(rng.poisson(rate * rng.gamma(5, 0.4, size=(n, 1))))
            labels += [condition] * n
            where += [context] * n
    counts = np.vstack(rows).astype(np.float32)
    counts[:, -1] += 1  # no cell is empty
    order = rng.permutation(len(counts))
    obs = pd.DataFrame({"perturbation": labels, "context": where, "batch": rng.integers(0, 2, len(counts))})
    obs.index = pd.Index([f"cell{i:04d}" for i in range(len(counts))])
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    return adata[order].copy()


def write_raw(folder: Path, adata: anndata.AnnData) -> Path:
    path = folder / "raw.h5ad"
    adata.copy().write_h5ad(path)  # writing turns strings into categories
    return path


def make_prepared(folder: Path, adata: anndata.AnnData | None = None, **sections: Any) -> Path:
    """`prepared.h5ad` in `folder`."""
    raw = write_raw(folder, make_counts() if adata is None else adata)
    path = folder / "prepared.h5ad"
    write_h5ad(path, prepare(raw, card(**sections), "world"))
    return path


ZERO_SHOT = UnseenCombo(kind="unseen_combo")
FEATURES = FeatureSpec(n_hvg=20, n_pcs=5)


def make_fold(
    folder: Path, prepared: Path, spec: SplitSpec = ZERO_SHOT, features: FeatureSpec = FEATURES, fold: int = 0
) -> tuple[Path, Path]:
    """`split.csv` and `features.csv` in `folder`."""
    split, chosen = folder / "split.csv", folder / "features.csv"
    write_split(split, make_split(open_prepared(prepared).obs, spec, fold, dataset="world", name="test"))
    write_features(chosen, compute_features(open_prepared(prepared), read_split(split), features))
    return split, chosen
