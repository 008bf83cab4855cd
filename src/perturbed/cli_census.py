"""`perturbed census VERB`: cells of the CELLxGENE Census and models trained on it, each a thin door to one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from perturbed.cli_options import DataDir, Mirror, Out, Unpinned, read_option
from perturbed.config import Section, parse
from perturbed.errors import ConfigError

census_app = typer.Typer(help="Cells of the CELLxGENE Census, and models trained on it.", no_args_is_help=True)

CellsCard = Annotated[str, typer.Option("--card", help="Card of config/census: YAML or JSON text, or a file.")]
ModelCardOption = Annotated[str, typer.Option("--card", help="Card of config/models: YAML or JSON text, or a file.")]
Name = Annotated[str, typer.Option(help="Name of the card.")]
_Card = TypeVar("_Card", bound=Section)


def _parse(model: type[_Card], text: str) -> _Card:
    return parse(model, read_option(text, "--card"), "--card")


def _settings(name: str, card: Section) -> dict[str, Any]:
    return {"name": name, "card": card.model_dump(mode="json")}


@census_app.command()
def simulate(
    name: Name,
    card: CellsCard,
    store: Annotated[Path, typer.Option(help="Folder to write: a store in the layout of the Census.")],
    truth: Annotated[Path, typer.Option(help="truth.csv to write: what was planted, gene by gene.")],
    gene_sets: Annotated[Path, typer.Option(help="GMT to write: planted pathways, traps and decoys.")],
) -> None:
    """Simulate mouse islets with a planted disease programme, as a store that the Census' client opens."""
    from perturbed.data.census.simulate import write_simulation
    from perturbed.data.census.spec import CensusCard, SimulationCells
    from perturbed.provenance import recorded

    parsed = _parse(CensusCard, card)
    if not isinstance(parsed.cells, SimulationCells):
        raise ConfigError(f"--card: cells.kind of {name} is {parsed.cells.kind!r}, not simulation; use `query`")
    with recorded("census simulate", truth, {}, _settings(name, parsed), beside=[store, gene_sets]):
        write_simulation(parsed.cells, name, store, truth, gene_sets)


@census_app.command()
def query(
    name: Name,
    card: CellsCard,
    out: Out,
    store: Annotated[Path | None, typer.Option(help="Store to read instead of the card's; for simulations.")] = None,
    data_dir: DataDir = Path("data"),
    mirror: Mirror = "",
    allow_unpinned: Unpinned = False,
) -> None:
    """Get cells with raw counts and their batch: cells.h5ad, from a release, a store or a frozen file."""
    from perturbed.data.census.frozen import find_file, find_symbols, read_frozen
    from perturbed.data.census.query import query_cells
    from perturbed.data.census.spec import CensusCard, H5adCells, MinifiedCells
    from perturbed.data.mirror import copy_slice
    from perturbed.provenance import recorded

    parsed = _parse(CensusCard, card)
    settings = {**_settings(name, parsed), "store": None if store is None else str(store)}
    with recorded("census query", out, {}, settings, read=[] if store is None else [store]):
        if isinstance(parsed.cells, H5adCells | MinifiedCells):
            if store is not None:
                raise ConfigError(f"--store: cells.kind of {name} is {parsed.cells.kind!r}, which is read from a file")
            near = Path(mirror) if mirror else None
            file = find_file(parsed.cells, name, data_dir=data_dir, mirror=near, allow_unpinned=allow_unpinned)
            symbols = find_symbols(parsed.cells, name, data_dir=data_dir, mirror=near, allow_unpinned=allow_unpinned)
            read_frozen(parsed, name, file, out, symbols)
        elif not (mirror and copy_slice(parsed, name, out, mirror)):
            query_cells(parsed, name, out, store=store)


@census_app.command()
def model(
    name: Name,
    card: ModelCardOption,
    out: Out,
    cells: Annotated[Path | None, typer.Option(help="cells.h5ad; fitted to, or checked against the model.")] = None,
    data_dir: DataDir = Path("data"),
    mirror: Mirror = "",
    allow_unpinned: Unpinned = False,
    device: Annotated[str, typer.Option(help="Where it is fitted: auto, cpu or cuda.")] = "auto",
) -> None:
    """Fit a model to cells, or get a published or saved one: a folder with model.pt, checked to be readable."""
    from perturbed.data.census.model import fetch_model, fit_model
    from perturbed.data.census.spec import FittedModel, ModelCard
    from perturbed.provenance import recorded

    parsed = _parse(ModelCard, card)
    with recorded("census model", out, {"cells": cells}, _settings(name, parsed)):
        if isinstance(parsed.model, FittedModel):
            if cells is None:
                raise ConfigError(f"--cells: model.kind of {name} is 'fit', so cells.h5ad is needed")
            fit_model(cells, parsed, out, name=name, device=device)
        else:
            near = Path(mirror) if mirror else None
            unpinned = allow_unpinned
            fetch_model(parsed, out, data_dir=data_dir, mirror=near, allow_unpinned=unpinned, cells=cells, name=name)
