"""`perturbed judge`: a thin door to the judge of pathways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbed.cli_options import Out, Spec, read_libraries, read_option


def judge(
    enrichment: Annotated[Path, typer.Option(help="Folder of `perturbed enrich`.")],
    gene_sets: Annotated[list[str], typer.Option("--gene-sets", help="NAME=PATH of a GMT that it read; repeat.")],
    out: Out,
    spec: Spec = "{}",
    cache: Annotated[
        Path | None, typer.Option(help="JSONL that keeps every answer (provider openai); run again to go on.")
    ] = None,
) -> None:
    """Ask a language model, blind, which pathways are relevant: verdicts.csv, answers.csv, odds.csv, agreement.csv."""
    from perturbed.config import parse
    from perturbed.pathways.judge import judge_pathways
    from perturbed.pathways.judge_spec import JudgeSpec
    from perturbed.provenance import recorded

    parsed = parse(JudgeSpec, read_option(spec, "--spec"), "--spec")
    libraries = read_libraries(gene_sets)
    inputs = {"enrichment": enrichment / "enrichment.csv", "top": enrichment / "top.csv", "replay": parsed.replay}
    settings = {"judge": parsed.model_dump(mode="json"), "cache": None if cache is None else str(cache)}
    with recorded("judge", out, {**inputs, **libraries}, settings):
        judge_pathways(enrichment, libraries, parsed, out, cache=cache)
