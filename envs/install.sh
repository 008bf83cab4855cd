#!/usr/bin/env bash
# Make .venv from a lock file: `envs/install.sh core` to run, `envs/install.sh dev` to test as well.
# torch: where pip is preset to look in a folder (find-links), the build that lies there is taken; elsewhere uv
# looks for a GPU driver and takes the matching CUDA build, or the CPU build where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1

die() { echo "perturbed: $*" >&2; exit 1; }

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$supported" 2>/dev/null; then python=$candidate; break; fi
done
[ -n "${python:-}" ] || die "Python 3.11, 3.12 or 3.13 is needed, found ${PYTHON:-$(python3 --version 2>&1)}; install one, or name it: make PYTHON=/path/to/python3.11"

links=${UV_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
if [ -n "$links" ]; then export UV_FIND_LINKS=$links; else export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}; fi
export UV_COMPILE_BYTECODE=1 VIRTUAL_ENV="$PWD/.venv"

if [ ! -x .venv/bin/uv ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv with pip; on Debian or Ubuntu: apt install $(basename "$python")-venv"
    echo "perturbed: making .venv with $("$python" --version)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
fi
echo "perturbed: installing envs/$kind.lock"
.venv/bin/uv pip install --quiet -r "envs/$kind.lock" -e .
touch .venv/core
[ "$kind" = core ] || touch ".venv/$kind"
