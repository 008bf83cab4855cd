#!/usr/bin/env bash
# Write the lock files, core and dev from pyproject.toml, the others from their own lists, and the conda environments: one resolution for Linux and Python 3.11 to 3.13.
# torch pins its own CUDA packages, so those lines are left out: a CPU build must not drag them in.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
compile() { # lock, source, further arguments
    local lock=$1 source=$2; shift 2
    env -u UV_FIND_LINKS "$uv" pip compile "$source" --universal --python-version 3.11 --quiet \
        --no-annotate --no-header "$@" | grep -v -E '^(nvidia-|cuda-|triton==)' > "$lock.part"
    mv "$lock.part" "$lock"
}
compile envs/core.lock pyproject.toml
compile envs/dev.lock pyproject.toml --group dev -c envs/core.lock
compile envs/gears.lock envs/gears.in -c envs/core.lock
compile envs/llama.lock envs/llama.in -c envs/core.lock
"${PYTHON:-.venv/bin/python}" envs/conda.py
