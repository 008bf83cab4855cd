"""`perturbed study VERB`: the stages of the studies, each a thin door to one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perturbed.cli_options import FeatureFile, Out, Prepared, Spec, SplitFile, Titles, read_option
from perturbed.errors import ConfigError

study_app = typer.Typer(help="Studies: tables and figures beyond the benchmark.", no_args_is_help=True)

NamedModels = Annotated[
    list[str], typer.Option("--model", help="A model/ of `perturbed fit`, as METHOD@SEED=PATH; repeat.")
]
Table = Annotated[Path, typer.Option("--table", help="The study's table, or its folder of tables.")]


def _study(text: str) -> Any:
    from pydantic import RootModel

    from perturbed.config import parse
    from perturbed.study_config import Study

    value = {"title": "", **read_option(text, "--spec")}
    return parse(RootModel[Study], value, "--spec").root


def _models(named: list[str]) -> dict[str, Path]:
    models = {}
    for item in named:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--model: {item!r} is not METHOD@SEED=PATH")
        models[name] = Path(path)
    return models


def _write(table: Any, out: Path) -> None:
    from perturbed.files import atomic

    with atomic(out) as part:
        table.to_csv(part, index=False, lineterminator="\n", float_format="%.6g")


@study_app.command()
def tabulate(
    scores: Annotated[list[Path], typer.Argument(help="scores.parquet files, references included.")],
    out: Out,
    spec: Spec,
    statistics: Annotated[str, typer.Option(help="The section `statistics` of the run.")] = "{}",
    history: Annotated[list[Path] | None, typer.Option(help="training.csv of a fit; repeat.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Table of a probe study.")] = None,
    published: Annotated[Path | None, typer.Option(help="csv of published numbers.")] = None,
    details: Annotated[list[Path] | None, typer.Option(help="details/ and features.csv of a fit, in pairs.")] = None,
) -> None:
    """Make the table of a comparison, conditions, sweep or denoising study from scores."""
    from perturbed.config import StatisticsSpec, parse
    from perturbed.evaluation.studies import StudyInputs, tabulate_study
    from perturbed.provenance import recorded

    study = _study(spec)
    parsed = parse(StatisticsSpec, read_option(statistics, "--statistics"), "--statistics")
    inputs = StudyInputs(history or (), probe, published, details or ())
    settings = {"study": study.model_dump(mode="json"), "n_files": len(scores)}
    read = [*scores, *inputs.histories, *inputs.details]
    with recorded("study tabulate", out, {"probe": probe, "published": published}, settings, read=read):
        _write(tabulate_study(scores, study, parsed, inputs), out)


@study_app.command()
def probe(
    prepared: Prepared, split: SplitFile, features: FeatureFile, model: NamedModels, spec: Spec, out: Out
) -> None:
    """Probe frozen representations for the condition, on cells held out of their training."""
    from perturbed.interpret.probes import probe_split
    from perturbed.provenance import recorded

    study = _study(spec)
    settings = {"study": study.model_dump(mode="json"), "models": model}
    models, inputs = _models(model), {"prepared": prepared, "split": split, "features": features}
    with recorded("study probe", out, inputs, settings, read=[*models.values()]):
        probe_split(prepared, split, features, models, study.options, out)


@study_app.command()
def programs(
    prepared: Prepared, features: FeatureFile, spec: Spec, out: Out,
    model: Annotated[list[Path], typer.Option(help="model/ of each seed; repeat.")],
    gene_sets: Annotated[Path | None, typer.Option(help="Gene sets (GMT).")] = None,
    truth: Annotated[Path | None, typer.Option(help="truth.h5ad of a simulation.")] = None,
) -> None:  # fmt: skip
    """Latent programs of fitted models: hits, graph, names, enrichment and stability, with permutation nulls."""
    from perturbed.interpret.programs import write_programs
    from perturbed.provenance import recorded

    study = _study(spec)
    inputs = {"prepared": prepared, "features": features, "gene_sets": gene_sets, "truth": truth}
    settings = {"study": study.model_dump(mode="json"), "models": list(map(str, model))}
    with recorded("study programs", out, inputs, settings, read=model):
        write_programs(model, prepared, features, gene_sets, truth, study.options, out)


@study_app.command()
def identify(
    setting: Annotated[str, typer.Option(help="One setting of an identifiability study: JSON.")],
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
) -> None:
    """Simulate one setting, fit, and measure how well the planted latents are recovered."""
    from perturbed.config import parse
    from perturbed.device import choose_device
    from perturbed.interpret.identifiability import run_setting
    from perturbed.interpret.identifiability_spec import IdentifiabilitySetting
    from perturbed.provenance import recorded

    parsed = parse(IdentifiabilitySetting, read_option(setting, "--setting"), "--setting")
    with recorded("study identify", out, {}, {"setting": parsed.model_dump(mode="json"), "seed": seed}):
        where = choose_device(device).name
        _write(run_setting(parsed, seed, where, threads), out)


@study_app.command("map")
def map_cells(
    prepared: Prepared, split: SplitFile, features: FeatureFile, model: NamedModels, spec: Spec, out: Out
) -> None:
    """t-SNE of a latent block of held-out cells."""
    from perturbed.interpret.latent_map import map_latents
    from perturbed.provenance import recorded

    study = _study(spec)
    inputs = {"prepared": prepared, "split": split, "features": features}
    models, settings = _models(model), {"study": study.model_dump(mode="json"), "models": model}
    with recorded("study map", out, inputs, settings, read=[*models.values()]):
        _write(map_latents(prepared, split, features, models, study), out)


@study_app.command()
def gather(
    parts: Annotated[list[Path], typer.Argument(help="Tables with the same columns.")],
    out: Out,
) -> None:
    """Join the tables of a study's jobs."""
    import pandas as pd

    from perturbed.provenance import recorded

    with recorded("study gather", out, {}, {"n_files": len(parts)}, read=parts):
        _write(pd.concat([pd.read_csv(path, keep_default_na=False, na_values=[""]) for path in parts]), out)


@study_app.command()
def draw(
    table: Table,
    spec: Spec,
    out: Annotated[Path, typer.Option("--out", help="Path without suffix; .svg, .png and .csv are written.")],
    titles: Titles = "{}",
) -> None:
    """Draw a study's figure: svg, png and the source data as csv."""
    from perturbed.figures import draw_study
    from perturbed.provenance import recorded

    study, named = _study(spec), read_option(titles, "--titles")
    with recorded("study draw", out, {"table": table}, {"study": study.model_dump(mode="json"), "titles": named}):
        draw_study(table, study, out, named)
