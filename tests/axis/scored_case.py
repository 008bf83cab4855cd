"""The case that the tests of this folder score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from perturbed.axis.spec import AxisCase

BETA = "type B pancreatic cell"
NORMAL, DISEASE = "normal", "type 2 diabetes mellitus"
SPEC: dict[str, Any] = {
    "cells": "islets", "model": "islets", "unperturbed": {"column": "disease", "values": NORMAL},
    "perturbed": {"column": "disease", "values": DISEASE}, "min_cells": 20, "top": 40, "n_bootstrap": 100,
    "n_permutations": 99,
}  # fmt: skip


def make_case(**changes: Any) -> AxisCase:
    """A case on the simulated islets."""
    return AxisCase.model_validate(SPEC | changes)


def read_table(tables: Path, name: str) -> pd.DataFrame:
    """A table of the case."""
    return pd.read_csv(tables / f"{name}.csv", keep_default_na=False, na_values=["", "nan"])
