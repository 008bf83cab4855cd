#!/usr/bin/env bash
# Write envs/core.lock and envs/dev.lock from pyproject.toml: one resolution for Linux and Python 3.11 to 3.13.
# torch pins its own CUDA packages, so those lines are left out: a CPU build must not drag them in.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
compile() { # lock, further arguments
    local lock=$1; shift
    env -u UV_FIND_LINKS "$uv" pip compile pyproject.toml --universal --python-version 3.11 --quiet \
        --no-annotate --no-header "$@" | grep -v -E '^(nvidia-|cuda-|triton==)' > "$lock.part"
    mv "$lock.part" "$lock"
}
compile envs/core.lock
compile envs/dev.lock --group dev -c envs/core.lock
