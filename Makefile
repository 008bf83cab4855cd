# `make run`: environment, embedded default, report. `make test`: every test that needs no root.
# Everything else is plain `snakemake` and `perturbed` in the environment (.venv).
.PHONY: run test test-cluster lint reference benchmark clean
SHELL := /bin/bash
RUN = PATH="$(CURDIR)/.venv/bin:$$PATH"

run: .venv/core
	@$(RUN) snakemake --profile profiles/local demo
	@echo "Report: $(CURDIR)/results/demo/report.html"

test: .venv/dev
	@$(RUN) OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile $(PYTEST)

# The profile on a Slurm of its own, which it installs, starts and disturbs on this machine (Debian or Ubuntu).
test-cluster: .venv/dev
	@[ "$$(id -u)" = 0 ] || { echo "make test-cluster: needs root, to install and start a Slurm"; exit 1; }
	@$(RUN) OMP_NUM_THREADS=1 pytest -m cluster tests/cluster $(PYTEST)

lint: .venv/dev
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy
	@$(RUN) snakefmt --check Snakefile workflow && $(RUN) snakemake --lint

# Speed and memory beside their targets; run it on an idle machine.
benchmark: .venv/dev
	@$(RUN) python benchmarks/run.py

# Schema and reference pages, written from the code.
reference: .venv/dev
	@$(RUN) perturbed config --write

.venv/core: envs/core.lock pyproject.toml envs/install.sh
	@envs/install.sh core

.venv/dev: envs/dev.lock pyproject.toml envs/install.sh
	@envs/install.sh dev

clean:
	rm -rf .venv .snakemake results/demo data/simulation data/simulation_epistasis data/simulation_deep data/simulation_epistasis_deep data/census
