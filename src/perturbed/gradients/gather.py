"""Groups and training seeds of a case in one set of tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from perturbed.errors import DataError
from perturbed.files import atomic

DRAWN = ("cells", "paths", "field", "umap", "umap_arrows")
"""Tables to draw: of the first group and seed only, since latent spaces of two fits have no common axes."""
VALUES = {
    "agreement": ("cosine", "mean", "p", "n_unperturbed", "n_perturbed", "n_units"),
    "genes": ("cosine", "correlation", "percentile_among_alike"),
    "arrivals": ("share_before", "share_after", "stopped"),
    "heads": ("value",),
    "quality": ("value",),
    "screen": ("cosine", "cosine_alike", "percentile_among_alike", "percentile_among_targets", "effect_size"),
}
"""Numbers that are averaged over seeds, by table."""
KEYS = ("judged", "group", "flow", "shift", "measure", "unit", "gene", "is_target", "head", "part", "metric",
        "perturbation", "n_genes")  # fmt: skip


def gather_flows(folders: Sequence[str | Path], out: str | Path) -> None:
    """Join the tables of all groups and seeds of a case, and summarise over seeds.

    Parameters
    ----------
    folders
        Outputs of `perturbed.gradients.cases.run_case` or `run_screen`, each called `…/GROUP/seedN`.
    out
        Folder to write: each table with the columns `judged` and `seed`, and `TABLE_seeds.csv` with the mean over
        seeds, the smallest and the largest value (`…_min`, `…_max`), and for intervals the lowest `low` and the highest
        `high` of any seed, so that "clear of 0" means clear of it for every seed. Tables that are only drawn are those
        of the first folder.

    Raises
    ------
    DataError
        If a folder is called otherwise.
    """
    places = [(Path(folder), *_name(Path(folder))) for folder in folders]
    names = sorted({path.stem for folder, _, _ in places for path in folder.glob("*.csv")})
    with atomic(out) as part:
        part.mkdir()
        for name in names:
            parts = [(read_csv(folder / f"{name}.csv"), judged, seed) for folder, judged, seed in places]
            if name in DRAWN:
                _write(parts[0][0], part / f"{name}.csv")
                continue
            found = [table.assign(judged=judged, seed=seed) for table, judged, seed in parts if len(table)]
            table = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
            if name != "genes":  # thousands of rows a fit, of which the summary says what is read
                _write(table, part / f"{name}.csv")
            _write(summarise_seeds(table, VALUES[name]), part / f"{name}_seeds.csv")


def summarise_seeds(table: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    """Mean and range over seeds of some columns, for each combination of the others that name a row."""
    if table.empty:
        return table
    keys = [key for key in KEYS if key in table]
    present = [value for value in values if value in table]
    grouped = table.groupby(keys, sort=False, dropna=False)
    found = grouped[present].mean()
    for value in present:
        found[f"{value}_min"], found[f"{value}_max"] = grouped[value].min(), grouped[value].max()
    if "low" in table:
        found["low"], found["high"] = grouped["low"].min(), grouped["high"].max()
    found["n_seeds"] = grouped["seed"].nunique()
    return found.reset_index()


def read_csv(path: Path) -> pd.DataFrame:
    """A table; one without columns is empty."""
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _name(folder: Path) -> tuple[str, int]:
    seed = folder.name.removeprefix("seed")
    if not seed.isdecimal():
        raise DataError(f"{folder}: not called GROUP/seedN; make it with `perturbed flow case`")
    return folder.parent.name, int(seed)


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
