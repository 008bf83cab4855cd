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
    with recorded("flow case", out, inputs, settings, read=[model]):
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

    with recorded("flow gather", out, {}, {"flows": [str(path) for path in flows]}, read=flows):
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
    from perturbed.provenance import recorded

    with recorded("flow draw", out, {"tables": tables}, {"figure": kind, "title": title}):
        draw_case_figure(kind, tables, out, title)


@flow_app.command()
def quality(
    tables: Annotated[list[Path], typer.Argument(help="Folders CASE/tables of `perturbed flow gather`.")],
    out: Stem,
    titles: Titles = "{}",
) -> None:
    """Draw how good the decoders of all cases are, as a table."""
    from perturbed.figures.gradients import draw_quality_figure
    from perturbed.provenance import recorded

    named = read_option(titles, "--titles")
    with recorded("flow quality", out, {}, {"titles": named}, read=tables):
        draw_quality_figure(tables, out, named)


def gradients(
    model: Annotated[Path, typer.Argument(help="Folder that scvi-tools saved, with model.pt.")],
    h5ad: Annotated[Path, typer.Argument(help="Cells with raw counts.")],
    column: Annotated[str, typer.Option(help="obs column of the two arms.")],
    unperturbed: Annotated[list[str], typer.Option(help="Its values for unperturbed cells; repeat.")],
    perturbed: Annotated[list[str], typer.Option(help="Its values for perturbed cells; repeat.")],
    out: Out,
    batch: Annotated[str | None, typer.Option(help="obs column of the batch; else that of the model.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts; else X.")] = None,
    gene_column: Annotated[str | None, typer.Option(help="var column of gene names; else the index.")] = None,
    per: Annotated[str | None, typer.Option(help="obs column, such as the cell type: each value apart.")] = None,
    flow: Annotated[list[str] | None, typer.Option(help="Gene whose flow is drawn; repeat.")] = None,
    knock_down: Annotated[bool, typer.Option(help="Flows against the gradient.")] = False,
    umap: Annotated[bool, typer.Option(help="Draw flows on a UMAP beside the principal components.")] = False,
    logits: Annotated[bool, typer.Option(help="Score what stands before softmax.")] = False,
    n_cells: Annotated[int, typer.Option(help="Most cells scored of each arm and group.", min=1)] = 2000,
    min_cells: Annotated[int, typer.Option(help="Groups with fewer cells in an arm are left out.", min=2)] = 20,
    n_steps: Annotated[int, typer.Option(help="Steps of the UMAP's arrows.", min=1)] = 20,
    delta: Annotated[float, typer.Option(help="Size of a step.")] = 0.05,
    trust_sha256: Annotated[str | None, typer.Option(help="Hash of a model.pt that may be unpickled in full.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of cells and of the UMAP.")] = 0,
) -> None:
    """Ask a saved scvi-tools model which genes lead from unperturbed to perturbed cells: gene_scores.csv and flows.

    The cases of the pipeline (`snakemake gradients`) are made of `perturbed flow`.
    """
    from perturbed.gradients.user import score_saved_model
    from perturbed.provenance import recorded

    settings = {"column": column, "unperturbed": unperturbed, "perturbed": perturbed, "seed": seed, "model": str(model)}
    with recorded("gradients", out, {"h5ad": h5ad}, settings, read=[model]):
        score_saved_model(
            model, h5ad, out, column=column, unperturbed=unperturbed, perturbed=perturbed, batch=batch, layer=layer,
            gene_column=gene_column, per=per, logits=logits, flow_genes=flow or (), knock_down=knock_down, umap=umap,
            n_steps=n_steps, delta=delta, n_cells=n_cells, min_cells=min_cells, trust_sha256=trust_sha256, seed=seed,
        )  # fmt: skip
