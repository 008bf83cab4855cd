#!/usr/bin/env bash
# Run by `snakemake --sdm conda` inside the new environment, in the folder of the run: installs this package there.
# A run outside of the checkout says where that is: export PERTURBED_ROOT=/path/to/checkout
set -euo pipefail
root=${PERTURBED_ROOT:-$PWD}
[ -f "$root/src/perturbed/cli.py" ] || { echo "perturbed: $root is no checkout of perturbed; export PERTURBED_ROOT=/path/to/checkout" >&2; exit 1; }
python -m pip install --quiet --disable-pip-version-check --no-deps -e "$root"
perturbed --help >/dev/null
