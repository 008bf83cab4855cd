"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from perturbed.errors import ConfigError

Out = Annotated[Path, typer.Option("--out", help="File or folder to write, whole or not at all.")]
Prepared = Annotated[Path, typer.Option(help="prepared.h5ad")]
SplitFile = Annotated[Path, typer.Option("--split", help="split.csv")]
FeatureFile = Annotated[Path, typer.Option("--features", help="features.csv")]
CardOption = Annotated[str, typer.Option("--card", help="Dataset card: YAML or JSON text, or a file.")]
Dataset = Annotated[str, typer.Option(help="Name of the dataset.")]
Spec = Annotated[str, typer.Option("--spec", help="The stage's section of the config: YAML or JSON text, or a file.")]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--memory-gb",
        help="Memory budget in GB; what needs more is streamed. Default: PERTURBED_MEMORY_GB, or half of what is free.",
    ),
]
Titles = Annotated[str, typer.Option("--titles", help="Method titles as a mapping.")]

DataDir = Annotated[Path, typer.Option(envvar="PERTURBED_DATA", help="Folder that keeps the downloads.")]
Mirror = Annotated[str, typer.Option(envvar="PERTURBED_MIRROR", help="Folder looked in first, by name and hash.")]
Unpinned = Annotated[
    bool, typer.Option(envvar="PERTURBED_ALLOW_UNPINNED", help="Accept files whose hash nobody has pinned.")
]


def read_option(text: str, name: str) -> dict[str, Any]:
    """A mapping given as YAML or JSON text, or as the path of a YAML file."""
    from perturbed.config import read_yaml

    if "\n" not in text and not text.lstrip().startswith("{") and text.strip():
        return read_yaml(text)
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML or JSON ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: must hold a mapping of keys to values")
    return value


def read_side_files(items: Sequence[str]) -> dict[str, Path]:
    """Side files of the data given as ROLE=PATH.

    Raises
    ------
    ConfigError
        If an item is not of that form, or a file does not exist.
    """
    files = {}
    for item in items:
        role, equals, path = item.partition("=")
        if not (role and equals and path):
            raise ConfigError(f"--file {item}: give ROLE=PATH, such as gene_sets=sets.gmt")
        if not Path(path).is_file():
            raise ConfigError(f"--file {item}: no such file; correct the path, or the card's files.{role}")
        files[role] = Path(path)
    return files


def read_libraries(items: Sequence[str]) -> dict[str, Path]:
    """Libraries given as NAME=PATH.

    Raises
    ------
    ConfigError
        If an item is not of that form, a name comes twice, or a file does not exist.
    """
    libraries: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--gene-sets {item}: give NAME=PATH, such as wikipathways=sets.gmt")
        if name in libraries:
            raise ConfigError(f"--gene-sets {item}: the name {name!r} is given twice")
        if not Path(path).is_file():
            raise ConfigError(f"--gene-sets {item}: no such file; correct the path")
        libraries[name] = Path(path)
    return libraries
