"""A made-up ranking and library: some sets planted on top, some of highly expressed genes, most random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd


def write_gmt(path: Path, sets: dict[str, list[str]]) -> Path:
    path.write_text("".join("\t".join((name, f"about {name}", *genes)) + "\n" for name, genes in sets.items()))
    return path


def make_rankings(
    scores: dict[str, np.ndarray], expression: np.ndarray, *, kept: np.ndarray | None = None, group: str = "beta"
) -> pd.DataFrame:
    """Lists of genes G0000 …, ranked by |score| among the kept."""
    n = len(expression)
    kept = np.ones(n, dtype=bool) if kept is None else kept
    parts = []
    for name, score in scores.items():
        table = pd.DataFrame({"list": name, "group": group, "gene": [f"ENSMUSG{i:011d}" for i in range(n)]})
        table["symbol"] = [f"G{i:04d}" for i in range(n)]
        table["score"] = np.where(kept, score, np.nan)
        order = pd.Series(np.where(kept, -np.abs(score), np.inf)).rank(method="first")
        table["rank"] = order.where(pd.Series(kept))
        table["kept"] = kept
        table["mean_expression"] = expression
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def write_rankings(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "rankings.csv", index=False)
    return folder / "rankings.csv"


def random_sets(n_genes: int, n_sets: int, rng: np.random.Generator, prefix: str = "SET") -> dict[str, list[str]]:
    sizes = rng.integers(8, 60, n_sets)
    return {
        f"{prefix}{i:03d}": [f"G{j:04d}" for j in rng.choice(n_genes, size, replace=False)]
        for i, size in enumerate(sizes)
    }


def expressed_sets(
    expression: np.ndarray, n_sets: int, rng: np.random.Generator, prefix: str = "HIGH"
) -> dict[str, list[str]]:
    """Sets whose genes are drawn by expression: what is highly expressed is annotated together."""
    share = np.exp(1.2 * expression)
    draws = (rng.choice(len(expression), 40, replace=False, p=share / share.sum()) for _ in range(n_sets))
    return {f"{prefix}{i:03d}": [f"G{j:04d}" for j in draw] for i, draw in enumerate(draws)}
