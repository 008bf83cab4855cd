"""`perturbed score-genes` and `perturbed axis draw`: genes along an axis between two arms of a scVI decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbed.cli_options import Out, Spec, read_option

axis_app = typer.Typer(help="Axis cases: genes along the axis between two arms of cells, drawn.", no_args_is_help=True)

Stem = Annotated[Path, typer.Option("--out", help="Path without suffix; .svg, .png and .csv are written.")]


@axis_app.callback()
def _axis() -> None:
    """Keep `draw` a sub-command even while it is the only one."""


def score_genes(
    cells: Annotated[Path, typer.Option(help="cells.h5ad of `perturbed census`.")],
    model: Annotated[Path, typer.Option(help="Folder with model.pt of scvi-tools.")],
    spec: Spec,
    out: Out,
    truth: Annotated[Path | None, typer.Option(help="truth.csv of a simulation, to judge the lists.")] = None,
    symbols: Annotated[Path | None, typer.Option(help="gene_id,symbol as csv, for cells without counts.")] = None,
    trust_sha256: Annotated[str | None, typer.Option(help="Hash of a model.pt that may be unpickled in full.")] = None,
) -> None:
    """Score every gene of a model along the axis from unperturbed to perturbed cells: a folder of tables.

    Rankings by gradients and by their rivals, intervals over donors, permuted labels, stability, composition, softmax,
    maps and flows; with a truth, how well each list finds the planted genes.
    """
    from perturbed.axis.run import score_axis
    from perturbed.axis.spec import AxisCase
    from perturbed.config import parse
    from perturbed.provenance import recorded

    case = parse(AxisCase, {"cells": "", "model": "", **read_option(spec, "--spec")}, "--spec")
    inputs = {"cells": cells, "model": model / "model.pt" if model.is_dir() else model, "truth": truth}
    with recorded("score-genes", out, inputs, {"case": case.model_dump(mode="json"), "model": str(model)}):
        score_axis(case, cells, model, out, truth=truth, symbols=symbols, trust_sha256=trust_sha256)


@axis_app.command()
def draw(
    kind: Annotated[str, typer.Argument(help="scores, flow, map or umap.")],
    tables: Annotated[Path, typer.Option(help="Folder of `perturbed score-genes`.")],
    out: Stem,
    title: Annotated[str, typer.Option(help="Title of the figure.")] = "",
    group: Annotated[str, typer.Option(help="scores: the group of cells to draw.")] = "all",
    flow: Annotated[list[str] | None, typer.Option(help="flow: draw these flows only; repeat.")] = None,
) -> None:
    """Draw an axis case: svg, png and the source data as csv."""
    from perturbed.figures.axis import draw_axis_figure
    from perturbed.provenance import recorded

    with recorded("axis draw", out, {"tables": tables}, {"figure": kind, "title": title, "group": group}):
        draw_axis_figure(kind, tables, out, title=title, group=group, flows=flow or ())


@axis_app.command()
def pathways(
    enrichment: Annotated[Path, typer.Option(help="Folder of `perturbed enrich`.")],
    out: Stem,
    judgement: Annotated[Path | None, typer.Option(help="Folder of `perturbed judge`.")] = None,
    published: Annotated[Path | None, typer.Option(help="csv of the paper's pathways, drawn beside ours.")] = None,
    level: Annotated[float, typer.Option(help="False discovery rate that counts as significant.")] = 0.05,
    title: Annotated[str, typer.Option(help="Title of the figure.")] = "",
) -> None:
    """Draw the first pathways of every list: svg, png and the source data as csv."""
    from perturbed.figures.pathways import draw_pathways
    from perturbed.provenance import recorded

    verdicts = None if judgement is None else judgement / "verdicts.csv"
    inputs = {"enrichment": enrichment, "judgement": judgement, "published": published}
    with recorded("axis pathways", out, inputs, {"title": title, "level": level}):
        draw_pathways(enrichment, verdicts, out, title, level=level, published=published)


@axis_app.command()
def table(
    enrichment: Annotated[Path, typer.Option(help="Folder of `perturbed enrich`.")],
    out: Annotated[Path, typer.Option("--out", help="Path without suffix; .csv and .html are written.")],
    judgement: Annotated[Path | None, typer.Option(help="Folder of `perturbed judge`.")] = None,
    published: Annotated[Path | None, typer.Option(help="csv of the paper's pathways, shown beside ours.")] = None,
    level: Annotated[float, typer.Option(help="False discovery rate that counts as significant.")] = 0.05,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "",
) -> None:
    """Write the first pathways of every list as a table: csv, and html to read."""
    from perturbed.figures.pathway_table import write_pathway_table
    from perturbed.provenance import check_whole

    check_whole(enrichment, *([] if judgement is None else [judgement]))
    verdicts = None if judgement is None else judgement / "verdicts.csv"
    write_pathway_table(enrichment, verdicts, out, title, level=level, published=published)


@axis_app.command()
def judge(
    judgement: Annotated[Path, typer.Option(help="Folder of `perturbed judge`.")],
    out: Stem,
    title: Annotated[str, typer.Option(help="Title of the figure.")] = "",
) -> None:
    """Draw what the judge said: svg, png and the source data as csv."""
    from perturbed.figures.judge import draw_judge_figure
    from perturbed.provenance import recorded

    with recorded("axis judge", out, {"judgement": judgement}, {"title": title}):
        draw_judge_figure(judgement, out, title)
