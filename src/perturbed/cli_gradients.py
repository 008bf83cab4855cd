"""`perturbed flow VERB`: the stages of the gradient cases, each a thin door to one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbed.cli_options import FeatureFile, Out, Prepared, Spec, SplitFile, Titles, read_option

flow_app = typer.Typer(help="Gradient cases: flows of fitted decoders, judged and drawn.", no_args_is_help=True)

Stem = Annotated[Path, typer.Option("--out", help="Path without suffix; .svg, .png and .csv are written.")]


@flow_app.command()
def case(
    model: Annotated[Path, typer.Option(help="model/ of `perturbed fit`: nb_vae or perturbedvae.")],
    prepared: Prepared,
    split: SplitFile,
    features: FeatureFile,
    spec: Spec,
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of bootstrap, nulls and the cells drawn.")] = 0,
    judged: Annotated[str, typer.Option(help="The group whose labels this model never saw; judge it alone.")] = "",
    truth: Annotated[Path | None, typer.Option(help="truth.h5ad of a simulation, for its planted effects.")] = None,
) -> None:
    """Follow the gradients of one decoder and judge them: a folder of tables."""
    from perturbed.config import parse
    from perturbed.gradients.cases import run_case
    from perturbed.gradients.screen import run_screen
    from perturbed.gradients.spec import GradientCase
    from perturbed.provenance import recorded

    named = {"dataset": "", "split": "", "method": "", **read_option(spec, "--spec")}
    parsed = parse(GradientCase, named, "--spec")
    inputs = {"prepared": prepared, "split": split, "features": features, "truth": truth}
    settings = {"case": parsed.model_dump(mode="json"), "model": str(model), "seed": seed, "judged": judged}
    with recorded("flow case", out, inputs, settings):
        if parsed.screen:
            run_screen(parsed, model, prepared, split, features, out, seed=seed, truth=truth)
        else:
            run_case(parsed, model, prepared, split, features, out, seed=seed, judged_group=judged or None)


@flow_app.command()
def gather(
    flows: Annotated[list[Path], typer.Argument(help="Folders GROUP/seedN of `perturbed flow case`.")], out: Out
) -> None:
    """Join groups and seeds of a case: tables with every seed, and their mean and range."""
    from perturbed.gradients.gather import gather_flows
    from perturbed.provenance import recorded

    with recorded("flow gather", out, {}, {"flows": [str(path) for path in flows]}):
        gather_flows(flows, out)


@flow_app.command()
def draw(
    kind: Annotated[str, typer.Argument(help="flow, umap or screen.")],
    tables: Annotated[Path, typer.Option(help="Folder of `perturbed flow gather`.")],
    out: Stem,
    title: Annotated[str, typer.Option(help="Title of the figure.")] = "",
) -> None:
    """Draw a case: svg, png and the source data as csv."""
    from perturbed.figures.gradients import draw_case_figure

    draw_case_figure(kind, tables, out, title)


@flow_app.command()
def quality(
    tables: Annotated[list[Path], typer.Argument(help="Folders CASE/tables of `perturbed flow gather`.")],
    out: Stem,
    titles: Titles = "{}",
) -> None:
    """Draw how good the decoders of all cases are, as a table."""
    from perturbed.figures.gradients import draw_quality_figure

    draw_quality_figure(tables, out, read_option(titles, "--titles"))
