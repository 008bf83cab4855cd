"""Every benchmark in one command, `python benchmarks/run.py`: each prints name, target and what was measured.

Each runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("dag", "prepare", "metrics", "training", "rivals_discrepancy", "rivals_sparse", "classical", "gradients",
              "axis_scores")  # fmt: skip


def main() -> None:
    chosen = sys.argv[1:] or BENCHMARKS
    print(f"{platform.platform()}, Python {platform.python_version()}", flush=True)
    for name in chosen:
        print(f"\n## {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)


if __name__ == "__main__":
    main()
