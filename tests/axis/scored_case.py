"""The case that the tests of this folder score."""

from __future__ import annotations

from typing import Any

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
