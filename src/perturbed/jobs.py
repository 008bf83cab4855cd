"""What the jobs of a run cost, read from the benchmark files that Snakemake leaves for every rule."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from perturbed.errors import DataError
from perturbed.files import atomic


def find_longest(results: Path, n: int = 10) -> pd.DataFrame:
    """The `n` longest jobs below a folder of results, longest first.

    Returns
    -------
    pandas.DataFrame
        `job` (the benchmark file's place below `results`, without `benchmarks` and suffix), `seconds` of wall clock,
        `memory_mb` (highest resident set, NaN for a job too short to be sampled).

    Raises
    ------
    DataError
        If there is no benchmark file.
    """
    rows = []
    for path in sorted(results.rglob("benchmarks/**/*.tsv")):
        table = pd.read_csv(path, sep="\t", na_values=["-"])
        job = path.relative_to(results).with_suffix("").as_posix().replace("benchmarks/", "")
        rows.append((job, float(table["s"].iloc[-1]), float(pd.to_numeric(table["max_rss"]).iloc[-1])))
    if not rows:
        raise DataError(f"{results}: no benchmark file below it; run snakemake first")
    table = pd.DataFrame(rows, columns=["job", "seconds", "memory_mb"])
    return table.sort_values(["seconds", "job"], ascending=[False, True]).head(n).reset_index(drop=True)


def spell_longest(table: pd.DataFrame) -> str:
    """The table as lines for a log."""
    lines = [f"{row.seconds:8.0f} s  {row.job}" for row in table.itertuples()]
    return "\n".join([f"The {len(table)} longest jobs:", *lines])


def print_longest(results: str | Path, n: int = 10) -> None:
    """Print the longest jobs on stderr and keep them as `longest_jobs.csv`; where no job ran, do nothing."""
    folder = Path(results)
    if not any(folder.rglob("benchmarks/**/*.tsv")):
        return
    table = find_longest(folder, n)
    print(spell_longest(table), file=sys.stderr)
    with atomic(folder / "longest_jobs.csv") as part:
        table.to_csv(part, index=False, lineterminator="\n")
