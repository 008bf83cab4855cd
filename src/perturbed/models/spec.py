"""Method files: what the planner must know of a method, read without importing its code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from perturbed.config import Section, find_card

Requirement = Literal["counts", "gene_names", "gene_sets", "gene_graph", "gene_embedding", "cell_embedding"]
"""What a method may need of a dataset beyond log-normalised cells with labels; `Card.provides` says what one offers."""


class MethodSpec(Section):
    """One file of `config/methods`."""

    title: str
    """Name in tables and figures."""
    implementation: str
    """`module:Class` of the method, such as `perturbed.models.baselines:Additive`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters; the class's `Params` lists them all."""
    stochastic: bool = False
    """True where another seed gives another fit; a method without randomness runs for the first seed only."""
    requires: tuple[Requirement, ...] = ()
    """What the data must offer. On data that do not, the method is left out by name, and the report says so."""
    environment: str = ""
    """Name of an environment of its own (`envs/NAME.lock`), for a method whose packages do not go with ours."""
    resources: Literal["cpu", "gpu"] = "cpu"
    """Class of machine it wants; profiles say what that means."""
    mem_mb: int = 4000
    """Memory of a fit on a data set of ordinary size."""
    runtime: int = 60
    """Minutes a fit may take."""
    reference: str = ""
    """Where the method was published."""


def load_method_spec(name: str, folders: Sequence[str | Path]) -> MethodSpec:
    """The file of method `name` from the first of `folders` that has it."""
    return find_card(MethodSpec, "methods: no file", name, folders)
