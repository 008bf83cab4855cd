"""Method files: what the planner must know of a method, read without importing its code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from perturbed.config import PLAIN_NAME, Section, find_card

Role = Literal["gene_sets", "gene_graph", "gene_embedding", "cell_embedding"]
"""What a side file holds."""
ROLES: tuple[str, ...] = get_args(Role)
Requirement = Literal["counts", "gene_names"] | Role
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
    files: dict[Role, str] = Field(default_factory=dict)
    """Side files of the method's own, by what they hold, in place of the dataset's; `{dataset}` is filled in. Where the
    file is not there the method is left out by name, so that it may be named before it is made."""
    environment: str = Field("", pattern=rf"^({PLAIN_NAME})?$")
    """Name of an environment of its own (`envs/NAME.lock`), for a method whose packages do not go with ours."""
    resources: Literal["cpu", "gpu"] = "cpu"
    """Class of machine it wants; profiles say what that means."""
    mem_mb: int = 4000
    """Memory of a fit on a data set of ordinary size."""
    runtime: int = 60
    """Minutes a fit may take."""
    reference: str = ""
    """Where the method was published."""

    def own_file(self, role: str, dataset: str) -> str | None:
        """The method's own side file of a role, or None where it takes the dataset's."""
        path = {str(key): path for key, path in self.files.items()}.get(role)
        return None if path is None else path.replace("{dataset}", dataset)


def load_method_spec(name: str, folders: Sequence[str | Path]) -> MethodSpec:
    """The file of method `name` from the first of `folders` that has it."""
    return find_card(MethodSpec, "methods: no file", name, folders)
