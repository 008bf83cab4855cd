"""Run the real Snakemake on a tiny screen, each run in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TABLES = ("tables/scores.parquet", "tables/summary.csv", "tables/contrasts.csv", "tables/strata.csv",
          "tables/calibration.csv", "tables/undefined.csv")  # fmt: skip


@dataclass
class Run:
    """A folder in which Snakemake runs one configuration."""

    folder: Path

    def configure(self, **changes: Any) -> None:
        config = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())
        config["cards"] = [str(ROOT / path) for path in config["cards"]]
        config["method_files"] = [str(ROOT / "config/methods")]
        for key, value in changes.items():
            inner, _, leaf = key.rpartition("__")
            (config[inner] if inner else config)[leaf] = value
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def command(self, *arguments: str) -> list[str]:
        base = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
        return [*base, "--configfile", "config.yaml", "--rerun-incomplete", *arguments]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(extra or {})}

    def snakemake(self, *arguments: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment(env),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def planned(self, *arguments: str) -> dict[str, int]:
        """How many jobs of each rule a dry run would start."""
        shown = self.snakemake("--dry-run", "--quiet", "rules", *arguments)
        table = re.findall(r"^(\w+)\s+(\d+)$", shown, flags=re.MULTILINE)
        return {rule: int(n) for rule, n in table if rule not in ("total", "all")}

    def tables(self) -> dict[str, bytes]:
        files = [self.folder / "results" / name for name in TABLES]
        files += sorted(self.folder.glob("results/**/model/state.*"))
        files += sorted(self.folder.glob("results/**/split.csv")) + sorted(self.folder.glob("results/**/features.csv"))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}
