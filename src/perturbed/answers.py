"""Which config answers an item of the papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perturbed.config import read_yaml

SECTIONS = ("studies", "gradients", "axes")
"""Sections of a config whose entries answer items of the papers."""


def where_answered(item: str, folder: Path) -> str:
    """One line on where an item that this config leaves out is answered, from the configs of a folder."""
    files = [f"--configfile {path}" for path in sorted(folder.glob("*.yaml")) if item in _answers(read_yaml(path))]
    return f"nothing in this config answers {item}; {' or '.join(files) or 'no config of ' + str(folder)} does"


def explain(item: str, folder: Path) -> Callable[[Any], str]:
    """`where_answered` as a function of wildcards, so that a workflow reads the configs only when it is asked for."""
    return lambda wildcards: where_answered(item, folder)


def _answers(config: Mapping[str, Any]) -> set[str]:
    return {item for section in SECTIONS for entry in (config.get(section) or {}).values() for item in _items(entry)}


def _items(entry: Mapping[str, Any]) -> Iterator[str]:
    """What an entry answers: by itself, by a flow of its own, or by its kind, where that is a target."""
    yield from entry.get("answers", ())
    yield entry.get("kind", "")
    for flow in entry.get("flows", ()):
        if isinstance(flow, Mapping):
            yield from flow.get("answers", ())
