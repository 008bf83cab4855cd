"""Predict single-cell perturbations, and ask trained decoders what they know of them."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbed.models.api import PerturbedVAEModel as PerturbedVAE

__all__ = ["PerturbedVAE"]
__version__ = version("perturbed")


def __getattr__(name: str) -> Any:
    """Import a model when it is first asked for, since torch takes seconds."""
    if name == "PerturbedVAE":
        from perturbed.models.api import PerturbedVAEModel

        return PerturbedVAEModel
    raise AttributeError(f"module 'perturbed' has no attribute {name!r}")
