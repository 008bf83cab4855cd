"""The registry of metrics: one entry holds the function and everything a reader must know of the number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from perturbed.errors import ConfigError, suggest
from perturbed.evaluation.undefined import Undefined

__all__ = [
    "METRICS",
    "Correction",
    "Metric",
    "Undefined",
    "Value",
    "describe",
    "metric",
    "reference_page",
    "select_metrics",
]

Value = float | tuple[float, str]
"""What a metric returns: the number, or the number and a note on how it was had."""

Correction = Literal["spearman_brown", "variance_components", "half", "root_half", "half_residual", "plain"]
"""How the score of two half-sized samples is carried to two samples of full size (see `references`)."""


@dataclass(frozen=True)
class Metric:
    """One metric and how to read it.

    Parameters
    ----------
    name
        The name in configs, tables and plots.
    summary
        One sentence on what it measures.
    formula
        Its definition, in the symbols of `docs/metrics.md`.
    direction
        1: higher is better; -1: lower is better; 0: nearer to `perfect` is better.
    range
        The values it can take.
    perfect
        The value of a prediction without any error.
    chance
        The value of a prediction without any information.
    floor, ceiling
        What to compare it with below and above: names of methods and references.
    level
        `mean` needs predicted means; `cells` uses the observed cells too; `set` is one number for a whole test set.
    topic
        Its section in `docs/metrics.md`.
    source
        Where the definition comes from.
    function
        `function(case) -> Value`, or for level `set` `function(cases) -> Value`; raises `Undefined`.
    to_full_n
        How a technical duplicate made of halves is corrected to the full number of cells.
    version
        Raised when the definition changes, so that old tables are not mixed with new ones.
    """

    name: str
    summary: str
    formula: str
    direction: Literal[-1, 0, 1]
    range: str
    perfect: float
    chance: str
    floor: str
    ceiling: str
    level: Literal["mean", "cells", "set"]
    topic: str
    source: str
    function: Callable[[Any], Value]
    to_full_n: Correction = "plain"
    version: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        """Limits of `range`; infinite where it names none for certain."""
        found = re.fullmatch(r"[\[(]([^,]+), ([^,]+)[\])]", self.range)
        if found is None:
            return -math.inf, math.inf
        low, high = (float(limit.replace("−", "-").replace("∞", "inf")) for limit in found.groups())
        return low, high


METRICS: dict[str, Metric] = {}
"""Every metric by name."""


def metric(
    *,
    formula: str,
    direction: Literal[-1, 0, 1],
    range: str,
    perfect: float,
    chance: str,
    floor: str,
    ceiling: str,
    level: Literal["mean", "cells", "set"],
    topic: str,
    source: str,
    to_full_n: Correction = "plain",
    version: int = 1,
) -> Callable[[Callable[[Any], Value]], Callable[[Any], Value]]:
    """Register a function as the metric of its name, and write the entry's fields into its docstring.

    Raises
    ------
    ConfigError
        If a metric of that name is there already, or the function has no docstring.
    """

    def register(function: Callable[[Any], Value]) -> Callable[[Any], Value]:
        name = getattr(function, "__name__", repr(function))
        if name in METRICS:
            raise ConfigError(f"metric {name!r} is registered twice; give the new one another name")
        if not function.__doc__:
            raise ConfigError(f"metric {name!r} has no docstring; say in one sentence what it measures")
        entry = Metric(
            name, " ".join(function.__doc__.split()), formula, direction, range, perfect, chance, floor, ceiling,
            level, topic, source, function, to_full_n, version,
        )  # fmt: skip
        function.__doc__ = "\n".join(
            [function.__doc__.strip(), ""] + [f"{key}: {text}." for key, text in describe(entry)]
        )
        METRICS[name] = entry
        return function

    return register


_DIRECTIONS = {1: "higher is better", -1: "lower is better", 0: "nearer to the perfect value is better"}
_CORRECTIONS = {
    "spearman_brown": "2r / (1 + r)",
    "variance_components": "r, with half of the sampling variance of the cells taken out of both variances",
    "half": "half the value",
    "root_half": "the value times √½",
    "half_residual": "1 − 2u / (4 − u), u = 1 − value",
    "plain": "none, the halves as they are",
}
_LEVELS = {"mean": "means", "cells": "means and cells", "set": "all test perturbations together"}


def describe(entry: Metric) -> list[tuple[str, str]]:
    """The fields of an entry as pairs of label and text."""
    return [
        ("Formula", entry.formula),
        ("Direction", _DIRECTIONS[entry.direction]),
        ("Range", entry.range),
        ("Perfect", f"{entry.perfect:g}"),
        ("Chance", entry.chance),
        ("Floor", entry.floor),
        ("Ceiling", entry.ceiling),
        ("Computed from", _LEVELS[entry.level]),
        ("Technical duplicate carried to the full n by", _CORRECTIONS[entry.to_full_n]),
        ("Source", entry.source),
        ("Version", str(entry.version)),
    ]


def select_metrics(names: Iterable[str] | Literal["all"]) -> list[Metric]:
    """The metrics a config asks for, in the registry's order.

    Raises
    ------
    ConfigError
        Names the unknown metric and the nearest known one.
    """
    if names == "all":
        return list(METRICS.values())
    wanted = list(names)
    if wanted == ["all"]:
        return list(METRICS.values())
    for name in wanted:
        if name not in METRICS:
            raise ConfigError(f"evaluation.metrics: unknown metric {name!r}; {suggest(name, METRICS)}")
    return [entry for name, entry in METRICS.items() if name in set(wanted)]


def reference_page() -> str:
    """The text of `docs/metrics.md`, generated from the registry."""
    from perturbed.evaluation.page import render

    return render(METRICS)


# The entries themselves; they import this module, so they come last.
import perturbed.evaluation.metrics  # noqa: E402, F401
