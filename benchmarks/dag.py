"""How long Snakemake needs to build the DAG of the paper's configuration."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    call = [sys.executable, "-m", "snakemake", "--dry-run", "--quiet", "all", "--cores", "1"]
    start = time.perf_counter()
    subprocess.run([*call, "--configfile", "config/paper.yaml"], cwd=ROOT, check=True, capture_output=True)
    print(f"{'DAG of config/paper.yaml':<44}{'<= 15 s':>14}{time.perf_counter() - start:>12.1f} s")


if __name__ == "__main__":
    main()
