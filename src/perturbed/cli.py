"""`perturbed VERB`: one verb per stage; `perturbed VERB --help` says what each reads and writes.

Each verb is a thin door: it reads its options, calls one function of the package and leaves a provenance record
beside its output. Imports are inside the verbs, because a run starts hundreds of processes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from perturbed.cli_axis import axis_app, score_genes
from perturbed.cli_census import census_app
from perturbed.cli_gradients import flow_app, gradients
from perturbed.cli_house import config, longest, report
from perturbed.cli_judge import judge
from perturbed.cli_mirror import fetch_file, mirror
from perturbed.cli_options import (
    CardOption,
    DataDir,
    Dataset,
    FeatureFile,
    MemoryOption,
    Mirror,
    Out,
    Prepared,
    Spec,
    SplitFile,
    Titles,
    Unpinned,
    read_option,
    read_side_files,
)
from perturbed.cli_pathways import enrich, gene_sets
from perturbed.cli_studies import study_app
from perturbed.errors import ConfigError, PerturbedError, find_errno, spell_os_error
from perturbed.interrupts import Stopped, heed_signals


class OneLineErrors(typer.core.TyperGroup):
    """Shows an error that a user can mend as one line on stderr, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except PerturbedError as error:
            line, code = str(error), 1
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and find_errno(error) is None:
                raise
            line, code = spell_os_error(error), 1
        except KeyboardInterrupt as stop:
            asked = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
            line, code = f"{asked}; nothing half-written is left, run the same command again", asked.code
        typer.echo(f"perturbed: {line}", err=True)
        raise typer.Exit(code)


app = typer.Typer(
    cls=OneLineErrors,
    name="perturbed",
    help="Predict single-cell perturbations, and ask trained decoders what they know of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(study_app, name="study")
app.add_typer(flow_app, name="flow")
app.add_typer(census_app, name="census")
app.command()(gradients)
app.add_typer(axis_app, name="axis")
app.command("score-genes")(score_genes)
app.command("gene-sets")(gene_sets)
app.command()(enrich)
app.command()(judge)
app.command()(mirror)
app.command("fetch-file")(fetch_file)
app.command()(config)
app.command()(longest)
app.command()(report)


def _split_spec(text: str) -> Any:
    from pydantic import RootModel

    from perturbed.config import SplitSpec, parse

    return parse(RootModel[SplitSpec], read_option(text, "--spec"), "--spec").root


def _card(text: str) -> Any:
    from perturbed.config import parse
    from perturbed.data.cards import Card

    return parse(Card, read_option(text, "--card"), "--card")


# --- data ---------------------------------------------------------------------------------------------------------


@app.command()
def fetch(
    dataset: Dataset,
    card: CardOption,
    out: Out,
    data_dir: DataDir = Path("data"),
    mirror: Mirror = "",
    allow_unpinned: Unpinned = False,
) -> None:
    """Get a dataset's files, check size and hash, and write raw.h5ad with values untouched."""
    from perturbed.data.fetch import fetch as run
    from perturbed.provenance import recorded

    parsed = _card(card)
    with recorded("fetch", out, {}, {"dataset": dataset, "card": parsed.model_dump(mode="json")}):
        folder = Path(mirror) if mirror else None
        run(parsed, dataset, out, data_dir=data_dir, mirror=folder, allow_unpinned=allow_unpinned)


@app.command()
def simulate(
    dataset: Dataset,
    card: CardOption,
    out: Out,
    truth: Annotated[Path, typer.Option(help="Where the planted truth is written.")],
    gene_sets: Annotated[Path | None, typer.Option(help="Where the planted gene sets go (GMT).")] = None,
) -> None:
    """Simulate Perturb-seq with planted truth: raw.h5ad, and truth.h5ad with the noise-free expression."""
    from perturbed.data.cards import SimulationSource
    from perturbed.data.simulate import write_simulation
    from perturbed.provenance import recorded

    parsed = _card(card)
    if not isinstance(parsed.source, SimulationSource):
        raise ConfigError(f"--card: source.kind of {dataset} is {parsed.source.kind!r}, not simulation; use `fetch`")
    settings = {"dataset": dataset, "card": parsed.model_dump(mode="json")}
    with recorded("simulate", out, {}, settings, beside=[truth, gene_sets]):
        write_simulation(parsed.source, dataset, out, truth, gene_sets)


@app.command()
def prepare(
    dataset: Dataset,
    raw: Annotated[Path, typer.Option(help="raw.h5ad")],
    card: CardOption,
    out: Out,
    memory_gb: MemoryOption = None,
) -> None:
    """Canonical names, quality control and fixed-target normalisation: prepared.h5ad, free of any split."""
    from perturbed.data.prepare_streamed import prepare_file
    from perturbed.provenance import recorded

    parsed = _card(card)
    with recorded("prepare", out, {"raw": raw}, {"dataset": dataset, "card": parsed.model_dump(mode="json")}):
        prepare_file(raw, parsed, dataset, out, memory_gb=memory_gb)


@app.command()
def split(
    dataset: Dataset,
    name: Annotated[str, typer.Option(help="Name of the split.")],
    prepared: Prepared,
    spec: Spec,
    out: Out,
    fold: Annotated[int, typer.Option(help="Fold, from 0.", min=0)] = 0,
) -> None:
    """Freeze which cells train, validate and test: split.csv with seed and hash."""
    from perturbed.data.contracts import open_prepared, write_split
    from perturbed.data.split import make_split
    from perturbed.provenance import recorded

    parsed = _split_spec(spec)
    with recorded("split", out, {"prepared": prepared}, {"spec": parsed.model_dump(mode="json"), "fold": fold}):
        obs = open_prepared(prepared).obs
        write_split(out, make_split(obs, parsed, fold, dataset=dataset, name=name))


@app.command()
def features(prepared: Prepared, split: SplitFile, spec: Spec, out: Out) -> None:
    """Genes, scaling and PCA of a split, from its training cells only: features.csv."""
    from perturbed.config import FeatureSpec, parse
    from perturbed.data.contracts import open_prepared, read_split, write_features
    from perturbed.data.features import compute_features
    from perturbed.provenance import recorded

    parsed = parse(FeatureSpec, read_option(spec, "--spec"), "--spec")
    with recorded("features", out, {"prepared": prepared, "split": split}, {"spec": parsed.model_dump(mode="json")}):
        write_features(out, compute_features(open_prepared(prepared), read_split(split), parsed))


@app.command("check-leakage")
def check_leakage(prepared: Prepared, split: SplitFile, features: FeatureFile, out: Out) -> None:
    """Prove that nothing of the test cells reaches training, or fail with the offending names: leakage.json."""
    from perturbed.data.contracts import open_prepared, read_features, read_split
    from perturbed.evaluation.leakage import check_leakage as run
    from perturbed.files import write_json
    from perturbed.provenance import recorded

    with recorded("check-leakage", out, {"prepared": prepared, "split": split, "features": features}, {}):
        result = run(open_prepared(prepared), read_split(split), read_features(features))
        write_json(out, result)


# --- methods ------------------------------------------------------------------------------------------------------


@app.command()
def fit(
    prepared: Prepared,
    split: SplitFile,
    features: FeatureFile,
    method: Annotated[str, typer.Option(help="Method: a file of config/methods, or its content as JSON.")],
    out: Out,
    name: Annotated[str, typer.Option(help="Name of the method in the tables; else its title.")] = "",
    leakage: Annotated[Path | None, typer.Option(help="leakage.json of this split; refused if of another.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw of the training.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
    history: Annotated[Path | None, typer.Option(help="Where the loss by epoch goes (csv).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Last checkpoint, to resume exactly from.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="A side file of the data, as ROLE=PATH.")] = None,
    memory_gb: MemoryOption = None,
    processes: Annotated[int, typer.Option(help="Processes that share each batch; one per GPU.", min=1)] = 1,
) -> None:
    """Fit one method on the training cells of one split: model/ with config.json and state.pt."""
    from perturbed.distributed import torchrun_rank
    from perturbed.models.fitting import fit_model
    from perturbed.provenance import recorded

    files = read_side_files(file or [])
    inputs = {"prepared": prepared, "split": split, "features": features, "leakage": leakage, **files}
    spec = read_option(method, "--method")
    settings = {"method": spec, "seed": seed, "threads": threads} | ({"processes": processes} if processes > 1 else {})
    recording: Any = nullcontext({}) if torchrun_rank() else recorded("fit", out, inputs, settings, beside=[history])
    with recording as record:  # of several processes, the first alone writes
        record["device"], record["device_reason"] = fit_model(
            spec, prepared, split, features, out,
            name=name, leakage=leakage, seed=seed, device=device, threads=threads,
            history=history, checkpoint=checkpoint, files=files, memory_gb=memory_gb, processes=processes,
        )  # fmt: skip


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="model/ of `perturbed fit`.")],
    split: SplitFile,
    prepared: Prepared,
    out: Out,
    method: Annotated[str, typer.Option(help="Name of the method in the tables.")],
    seed: Annotated[int, typer.Option(help="Seed of sampled cells.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
) -> None:
    """Predict every test perturbation of a split: prediction.h5ad, one row per perturbation and context."""
    from perturbed.models.fitting import predict_split
    from perturbed.provenance import recorded

    inputs, settings = {"prepared": prepared, "split": split}, {"model": str(model), "seed": seed}
    with recorded("predict", out, inputs, settings, read=[model], beside=[out.with_name("cells.h5ad")]):
        predict_split(model, prepared, split, out, method=method, seed=seed, threads=threads)


# --- evaluation ---------------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    truth: Annotated[Path, typer.Option(help="prepared.h5ad, which holds the test cells.")],
    split: SplitFile,
    prediction: Annotated[Path | None, typer.Option(help="prediction.h5ad, ours or your own.")] = None,
    references: Annotated[bool, typer.Option(help="Score floors and ceilings instead of a prediction.")] = False,
    features: Annotated[Path | None, typer.Option(help="features.csv; all genes without it.")] = None,
    noise_free: Annotated[Path | None, typer.Option(help="truth.h5ad of a simulation, for the references.")] = None,
    out: Out = Path("scores.parquet"),
    spec: Spec = "{}",
    method: Annotated[str | None, typer.Option(help="Name in the table, if the prediction has none.")] = None,
    details: Annotated[Path | None, typer.Option(help="Folder for the tables that figures draw.")] = None,
) -> None:
    """Score a prediction, ours or your own, against the test cells: scores.parquet, a long table.

    Your own file needs log-normalised means in X, gene names in var_names (any order, extra genes are ignored) and
    obs["perturbation"]; add obs["context"] where the data have contexts.
    """
    from perturbed.config import EvaluationSpec, parse
    from perturbed.data.contracts import write_scores
    from perturbed.evaluation.evaluate import evaluate as score
    from perturbed.evaluation.evaluate import write_details
    from perturbed.evaluation.references import score_references
    from perturbed.provenance import recorded

    if references == (prediction is not None):
        raise ConfigError("evaluate: give either --prediction FILE or --references")
    parsed = parse(EvaluationSpec, read_option(spec, "--spec"), "--spec")
    inputs = {"truth": truth, "split": split, "prediction": prediction, "features": features, "noise_free": noise_free}
    with recorded("evaluate", out, inputs, {"spec": parsed.model_dump(mode="json")}, beside=[details]):
        if prediction is None:
            write_scores(out, score_references(truth, split, features, parsed, truth=noise_free))
            return
        write_scores(out, score(truth, split, prediction, parsed, features=features, method=method))
        if details is not None:
            write_details(truth, split, prediction, features, details)


@app.command()
def summarise(
    scores: Annotated[list[Path], typer.Argument(help="scores.parquet files, references included.")],
    out: Out,
    spec: Spec = "{}",
    config: Annotated[str, typer.Option(help="The run, for capabilities.csv: which method runs on which data.")] = "",
) -> None:
    """Merge scores and judge the differences: summary, contrasts, strata, calibration and undefined scores."""
    from perturbed.config import StatisticsSpec, parse
    from perturbed.evaluation.summarise import summarise as run
    from perturbed.files import atomic
    from perturbed.plan import Plan
    from perturbed.provenance import recorded

    parsed = parse(StatisticsSpec, read_option(spec, "--spec"), "--spec")
    capabilities = Plan(read_option(config, "--config")).tabulate_capabilities() if config else None
    settings = {"spec": parsed.model_dump(mode="json"), "n_files": len(scores)}
    with recorded("summarise", out, {}, settings, read=scores), atomic(out) as part:
        run(scores, parsed, part)
        if capabilities is not None:
            capabilities.to_csv(part / "capabilities.csv", index=False, lineterminator="\n")


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="Which figure.")],
    out: Annotated[Path, typer.Option("--out", help="Path without suffix; .svg, .png and .csv are written.")],
    tables: Annotated[Path | None, typer.Option(help="Folder of `perturbed summarise`.")] = None,
    details: Annotated[list[Path] | None, typer.Option(help="Files of `evaluate --details` or training.csv.")] = None,
    dataset: Annotated[str, typer.Option(help="Dataset to draw.")] = "",
    split: Annotated[str, typer.Option("--split-name", help="Split to draw.")] = "",
    spec: Spec = "{}",
    titles: Titles = "{}",
) -> None:
    """Draw a figure from tables: svg, png and the source data as csv."""
    from perturbed.config import StatisticsSpec, parse
    from perturbed.figures import FigureInputs, draw_figure
    from perturbed.provenance import recorded

    parsed = parse(StatisticsSpec, read_option(spec, "--spec"), "--spec")
    titles_read = read_option(titles, "--titles")
    settings = {"figure": name, "spec": parsed.model_dump(mode="json"), "titles": titles_read}
    with recorded("figure", out, {"tables": tables}, settings, read=details or []):
        inputs = FigureInputs.from_files(tables, details or [])
        draw_figure(name, inputs, out, dataset=dataset, split=split, spec=parsed, titles=titles_read)


def _end_quietly_after_hdf5() -> list[str]:
    """Keep what HDF5 says of files that it cannot close to itself; return where it is noted.

    On a full disk it fails again for every object that is still open, and may then crash the process at its end.
    """
    noted: list[str] = []
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def heard(value: BaseException | None, where: Any = "") -> bool:
        known = "file write failed" in str(value) or "h5py" in str(where)
        noted.extend([str(value)] * known)
        return known

    # Its destructors print first and then report: the one hook sees the traceback, the other what was ignored.
    sys.excepthook = lambda kind, value, trace: None if heard(value) else show(kind, value, trace)
    sys.unraisablehook = lambda one: None if heard(one.exc_value, one.object) else show_unraisable(one)
    return noted


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anndata").setLevel(logging.WARNING)  # it announces every column it stores as categorical
    logging.captureWarnings(True)
    heed_signals()  # a scheduler's polite end must clean up as Ctrl-C does
    unclosed = _end_quietly_after_hdf5()
    try:
        typer.main.get_command(app)()  # `app()` would put back a hook for errors
    except SystemExit as end:
        if end.code and unclosed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))
        raise


if __name__ == "__main__":
    main()
