"""`perturbed config`, `report` and `longest`: the configuration, the report, and where the time of a run went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from perturbed.cli_options import read_option
from perturbed.errors import PerturbedError


def config(
    write: Annotated[bool, typer.Option(help="Write schema and reference pages from the code.")] = False,
    resolve: Annotated[str | None, typer.Option(help="Resolve this config (text or file), defaults filled in.")] = None,
    out: Annotated[Path, typer.Option(help="Where the resolved config goes.")] = Path("config.yaml"),
) -> None:
    """Check and resolve a configuration, or write its schema and the generated reference pages."""
    from perturbed.files import write_text
    from perturbed.plan import Plan
    from perturbed.provenance import recorded
    from perturbed.reference import write_reference

    if write:
        for path in write_reference(Path()):
            typer.echo(path)
    if resolve is not None:
        resolved = Plan(read_option(resolve, "--resolve")).config.model_dump(mode="json")
        with recorded("config", out, {}, {}):
            write_text(out, yaml.safe_dump(resolved, sort_keys=False))


def report(
    figures: Annotated[list[Path], typer.Argument(help="Figures (svg) that the run has made.")],
    snakefile: Annotated[Path, typer.Option(help="The Snakefile of the run.")],
    config: Annotated[Path, typer.Option(help="The run's configuration.")],
    out: Annotated[Path, typer.Option("--out", help="report.html to write.")],
) -> None:
    """Assemble Snakemake's own report of figures that are made: one html file. Run it where the run was started."""
    from perturbed.files import atomic
    from perturbed.provenance import recorded

    with recorded("report", out, {"config": config}, {}, read=figures), atomic(out) as part:
        # It reads, so it needs no lock, which the very run that asks for it holds.
        call: list[str | Path] = [sys.executable, "-m", "snakemake", "--snakefile", snakefile, "--configfile", config]
        # The order of figures in it is that of a set: fixed, so that equal runs have equal reports but for times.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run([*call, "--nolock", "--report", part, "--", *figures], env=environment)
        if done.returncode != 0 or not part.is_file():
            raise PerturbedError(f"{out}: Snakemake made no report; what it says stands above")


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
