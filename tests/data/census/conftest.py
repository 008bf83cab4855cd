from __future__ import annotations

import pytest
from census_world import small_islets, write


@pytest.fixture(scope="session")
def islets():
    return small_islets()


@pytest.fixture(scope="session")
def store(islets, tmp_path_factory):
    """A store of the small islets; not to be changed."""
    return write(islets, tmp_path_factory.mktemp("census") / "store")
