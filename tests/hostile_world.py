"""Cells whose every name would do harm in a shell, a path, a web page or a formula, if anything took it for one."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from data_world import SINGLES, make_counts

PERTURBED = ("$(touch harm)", "a;touch harm", "../harm", "a\nb, c", "-rf 'x\" \\", "$\\frac$")
"""Names of perturbed genes; the last is a broken formula."""
GENES = ("`touch harm`", "<script>harm()</script>", "{wildcards.harm}", "%s", "# harm: 1", "=cmd()")
"""Names of further genes."""
CONTEXTS = ("T cell; touch harm", "../$(touch harm)")
CELL = '\'; touch harm; "$(touch harm)",\n'
"""How the names of cells begin."""


def hostile(label: str) -> str:
    """A label of the small world with its genes renamed."""
    names = dict(zip(SINGLES, PERTURBED, strict=True))
    return "+".join(names.get(part, part) for part in label.split("+"))


def write_hostile(path: Path) -> anndata.AnnData:
    """Raw counts of such cells."""
    adata = make_counts(n_cells=10, n_control=24, n_genes=40, contexts=CONTEXTS)
    genes = [*PERTURBED, *GENES, *adata.var_names[len(PERTURBED) + len(GENES) :]]
    adata.var_names = pd.Index(genes)
    adata.obs["perturbation"] = [hostile(label) for label in adata.obs["perturbation"]]
    adata.obs_names = pd.Index([f"{CELL}{name}" for name in adata.obs_names])
    adata.copy().write_h5ad(path)
    return adata


def harm_done(*folders: Path) -> list[Path]:
    """Files that only an executed or followed name can have made."""
    found = [path for folder in folders for path in folder.rglob("*") if path.name in ("harm", "-rf", "x")]
    return [*found, *(path for folder in folders for path in folder.parent.glob("harm*"))]
