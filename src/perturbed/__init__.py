"""Predict single-cell perturbations, and ask trained decoders what they know of them."""

from importlib.metadata import version

__version__ = version("perturbed")
