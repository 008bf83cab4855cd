#!/usr/bin/env python3
"""Write the conda environments from pyproject.toml and the lock files: `envs/conda.py`, or `--check` to compare only.

Snakemake copies an environment file elsewhere before conda reads it, so nothing in it may be relative: the pins stand
in it, one by one, and `core.post-deploy.sh` installs this package. Only Python's own library is used.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ENVS = Path(__file__).resolve().parent
PYTHON = "3.11"
"""What the locks are resolved for first, and the container runs."""


def spell(name: str) -> str:
    """The conda environment of the lock file `NAME.lock`."""
    needs = tomllib.loads((ENVS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    match = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", needs)
    if match is None or not int(match[1]) <= int(PYTHON.split(".")[1]) < int(match[2]):
        raise SystemExit(
            f"perturbed: pyproject.toml: requires-python {needs} leaves Python {PYTHON} out; change envs/conda.py"
        )
    what = "of every rule" if name == "core" else f"`{name}`"
    head = [
        f"# The environment {what} for conda users, written by envs/conda.py from envs/{name}.lock; not to be edited.",
        f"name: perturbed-{name}",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        f"  - python={PYTHON}",
        "  - pip",
        *(["  - uv"] if name == "core" else []),
        "  - pip:",
    ]
    pins = [line for line in (ENVS / f"{name}.lock").read_text(encoding="utf-8").splitlines() if line.strip()]
    return "\n".join([*head, *(f"      - {_quoted(pin)}" for pin in pins)]) + "\n"


def _quoted(pin: str) -> str:
    return '"' + pin.replace('"', '\\"') + '"' if ";" in pin else pin


def names() -> list[str]:
    """Every lock that users need; `dev` is for those who change the code."""
    return sorted(path.stem for path in ENVS.glob("*.lock") if path.stem != "dev")


def main(arguments: list[str]) -> int:
    """Write the files, or name those that differ."""
    stale = [name for name in names() if not _same(name)]
    if arguments == ["--check"]:
        for name in stale:
            print(f"perturbed: envs/{name}.yaml differs from envs/{name}.lock; run envs/conda.py", file=sys.stderr)
        return int(bool(stale))
    for name in stale:
        (ENVS / f"{name}.yaml").write_text(spell(name), encoding="utf-8")
    return 0


def _same(name: str) -> bool:
    path = ENVS / f"{name}.yaml"
    return path.is_file() and path.read_text(encoding="utf-8") == spell(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
