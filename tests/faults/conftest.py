"""The world that faults are put into: every stage of the pipeline run once on tiny data."""

from __future__ import annotations

from pathlib import Path

import fault_world
import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read it: tests break copies."""
    folder = tmp_path_factory.mktemp("world")
    fault_world.build(folder)
    return folder
