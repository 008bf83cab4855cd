"""`perturbed config` and `perturbed longest`: the configuration, and where the time of a run went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from perturbed.cli_options import read_option


def config(
    write: Annotated[bool, typer.Option(help="Write schema and reference pages from the code.")] = False,
    resolve: Annotated[str | None, typer.Option(help="Resolve this config (text or file), defaults filled in.")] = None,
    out: Annotated[Path, typer.Option(help="Where the resolved config goes.")] = Path("config.yaml"),
) -> None:
    """Check and resolve a configuration, or write its schema and the generated reference pages."""
    from perturbed.files import write_text
    from perturbed.plan import Plan
    from perturbed.reference import write_reference

    if write:
        for path in write_reference(Path()):
            typer.echo(path)
    if resolve is not None:
        resolved = Plan(read_option(resolve, "--resolve")).config.model_dump(mode="json")
        write_text(out, yaml.safe_dump(resolved, sort_keys=False))


def longest(
    results: Annotated[Path, typer.Option(help="Folder of a run.")],
    n: Annotated[int, typer.Option(help="How many jobs.", min=1)] = 10,
    out: Annotated[Path | None, typer.Option("--out", help="Where the table goes (csv); else only printed.")] = None,
) -> None:
    """The longest jobs of a run, from the benchmark files that every rule leaves."""
    from perturbed.files import atomic
    from perturbed.jobs import find_longest, spell_longest

    table = find_longest(results, n)
    typer.echo(spell_longest(table))
    if out is not None:
        with atomic(out) as part:
            table.to_csv(part, index=False, lineterminator="\n")
