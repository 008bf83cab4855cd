"""The metrics, one topic a module; importing them registers them."""

from perturbed.evaluation.metrics import (
    differential_expression,
    direction,
    distribution,
    error,
    published,
    ranking,
    spread,
)

__all__ = ["differential_expression", "direction", "distribution", "error", "published", "ranking", "spread"]
