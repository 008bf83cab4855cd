"""Fixtures of the workflow tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import Run


@pytest.fixture
def new_run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.configure()
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One undisturbed run, for tests that only read it."""
    run = Run(tmp_path_factory.mktemp("finished"))
    run.configure()
    run.snakemake()
    return run
