"""Cards of Census cells (`config/census/NAME.yaml`) and of models trained on them (`config/models/NAME.yaml`)."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from perturbed.config import Names, Section, find_card
from perturbed.data.cards import About, RemoteFile
from perturbed.data.download import Refused, check_address
from perturbed.pathways.spec import IdTable

Organism = Literal["mus_musculus", "homo_sapiens"]
GENE_IDS: dict[str, str] = {"mus_musculus": "ENSMUSG", "homo_sapiens": "ENSG"}
"""How Ensembl's gene ids of each organism begin."""
BATCH = ("dataset_id", "assay", "suspension_type", "donor_id")
"""The columns whose values, joined without a separator, name the batches of the published models."""


def _check_date(value: str) -> str:
    if value in ("stable", "latest"):
        raise ValueError(f"{value!r} names another release every half year; name one by its date, such as 2023-12-15")
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is no date of the form yyyy-mm-dd") from None
    return value


def _check_uri(value: str | None) -> str | None:
    parts = urlsplit(value or "")
    if "@" in parts.netloc or parts.query:  # records and logs show it
        raise ValueError("give the address without user, password or query")
    if value is not None and "://" in value and parts.scheme != "s3":
        try:
            check_address(value, False)
        except Refused as error:
            raise ValueError(f"{error}; give https, s3 or a folder") from None
    return value


# YAML reads an unquoted 2023-12-15 as a date.
Version = Annotated[
    str,
    BeforeValidator(lambda v: v.isoformat() if isinstance(v, datetime.date) else v),
    AfterValidator(_check_date),
]
Value = str | bool | int | float


class Clause(Section):
    """A condition on one column of `obs`: one of `values`, or numbers from `at_least` to `at_most`."""

    column: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Column of `obs`."""
    values: Annotated[
        tuple[Value, ...] | None, BeforeValidator(lambda v: (v,) if isinstance(v, str | bool | int | float) else v)
    ] = None
    """The values that are kept."""
    at_least: float | None = None
    """Smallest number that is kept."""
    at_most: float | None = None
    """Largest number that is kept."""

    @model_validator(mode="after")
    def _check_condition(self) -> Clause:
        if (self.values is None) == (self.at_least is None and self.at_most is None):
            raise ValueError("give `values`, or `at_least` and `at_most`")
        if self.values is not None and not self.values:
            raise ValueError("`values` is empty, so no cell would be left")
        return self


Clauses = Annotated[tuple[Clause, ...], BeforeValidator(lambda v: (v,) if isinstance(v, dict) else v)]

# --- cells --------------------------------------------------------------------------------------------------------


class _Selection(Section):
    columns: Names = ("cell_type", "disease", "sex", "development_stage", "tissue", "nnz", "raw_sum")
    """Columns of `obs` to keep, beside `soma_joinid`, `is_primary_data` and those that name the batch. A frozen file
    that lacks `nnz` or `raw_sum` has them computed."""
    primary_only: bool = True
    """Leave out the cells that another dataset of the Census holds as well."""
    genes: tuple[str, ...] | None = None
    """Ensembl ids of the genes to keep; leave out for all."""
    max_cells: int | None = Field(None, ge=1)
    """At most so many cells, drawn evenly from those that match; leave out for all."""
    seed: int = Field(0, ge=0)
    """Seed of the draw of `max_cells`, and of simulated cells."""


class QueryCells(_Selection):
    """Cells of a release of the Census, streamed."""

    kind: Literal["query"]
    organism: Organism
    """Whose cells."""
    census_version: Version
    """Date of the release. `stable` and `latest` are refused: they name another release every half year."""
    uri: Annotated[str | None, AfterValidator(_check_uri)] = None
    """A local or mirrored store of that release: a folder, or an address with https or s3 and without user or password;
    leave out for the published one."""
    obs_filter: Annotated[
        tuple[Clause | str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | dict) else v)
    ] = ()
    """Conditions that all must hold: `{column, values}`, or text in the filter language of SOMA, such as
    `tissue_general == 'pancreas'`. Of a cell with several values, `A || B`, each counts in `values`, none in text."""

    @model_validator(mode="after")
    def _check_genes(self) -> QueryCells:
        _check_gene_ids(self.genes, self.organism)
        return self


class _FileCells(_Selection):
    organism: Organism = "mus_musculus"
    """Whose cells."""
    file: RemoteFile | None = None
    """The file on the web."""
    local: str | None = None
    """The file on this machine, instead of `file`."""
    obs_filter: Clauses = ()
    """Conditions that all must hold. They are kept apart so that an empty result can say which of them empties it."""

    @model_validator(mode="after")
    def _check_one_source(self) -> _FileCells:
        if (self.file is None) == (self.local is None):
            raise ValueError("give either `file` (on the web) or `local` (on this machine)")
        _check_gene_ids(self.genes, self.organism)
        return self


class MinifiedCells(_FileCells):
    """`adata_minified.h5ad` beside a published model: cells with their latents, without counts."""

    kind: Literal["minified"]
    qzm: str = "_scvi_latent_qzm"
    """Key of the posterior means in `obsm`."""
    qzv: str = "_scvi_latent_qzv"
    """Key of the posterior variances in `obsm`."""
    symbols: IdTable | None = None
    """Table from Ensembl ids to symbols, which gene sets and flows need; for files that name genes by ids only."""


class H5adCells(_FileCells):
    """A dataset's frozen h5ad, which has `obs` columns that the Census leaves out."""

    kind: Literal["h5ad"]
    dataset_id: str | None = None
    """Dataset of the cells, for their batch, where the file has no such column (files of the Census have none)."""
    counts: Literal["auto", "raw", "X"] = "auto"
    """Where the counts are; `auto` takes `raw.X`, or `X` where there is none."""


class IsletParams(Section):
    """Simulated mouse islets; defaults take a few seconds."""

    n_cells: int = Field(6000, ge=200)
    """Cells, duplicates included."""
    n_genes: int = Field(800, ge=300)
    """Genes, known ones of islets first."""
    n_up: int = Field(45, ge=5)
    """Genes that rise in disease."""
    n_down: int = Field(45, ge=5)
    """Genes that fall in disease."""
    effect: float = Field(0.4, gt=0)
    """Mean size of a planted effect on the log rate, per unit of the disease programme."""
    disease_shift: float = Field(1.0, ge=0)
    """By how much the programme's mean differs between the groups, in β cells."""
    alpha_share: float = Field(0.6, ge=0, le=1)
    """Share of the shift that α cells undergo; other cells undergo a quarter of that."""
    programme_sd: float = Field(0.7, gt=0)
    """Spread of the programme among cells of a donor: some healthy cells sit further along."""
    donor_sd: float = Field(0.25, ge=0)
    """Spread of the programme's mean among donors of a group."""
    donor_gene_sd: float = Field(0.12, ge=0)
    """Spread among donors of every gene's log rate."""
    batch_sd: float = Field(0.2, ge=0)
    """Spread among datasets and among assays of every gene's log rate."""
    age_effect: float = Field(0.8, ge=0)
    """Size of the age effect of the old healthy donors, a confounder that a matched design avoids."""
    n_donors: int = Field(3, ge=2)
    """Donors per arm of each of the two matched experiments."""
    duplicates: float = Field(0.06, ge=0, lt=0.5)
    """Share of cells that are non-primary copies in a third dataset."""
    poor_cells: float = Field(0.03, ge=0, lt=0.5)
    """Share of cells with few counts."""
    depth: float = Field(2500.0, ge=200)
    """Median counts of a cell."""
    n_decoys: int = Field(180, ge=150)
    """Gene sets with nothing planted in them."""


class SimulationCells(_Selection):
    """Simulated islets with planted truth, written as a store in the layout of the Census and queried as one."""

    kind: Literal["simulation"]
    params: IsletParams = IsletParams()
    """Parameters of the simulation."""
    obs_filter: Clauses = ()
    """Conditions that all must hold. They are kept apart so that an empty result can say which of them empties it."""

    @property
    def organism(self) -> Organism:
        """Simulated cells are those of mice."""
        return "mus_musculus"

    @property
    def census_version(self) -> str:
        """The release whose layout the store has."""
        return "2023-12-15"


CensusCells = Annotated[
    QueryCells | MinifiedCells | H5adCells | SimulationCells,
    Field(discriminator="kind"),
]


class CensusExpectations(Section):
    """What the cells must hold, so that a changed release or filter is noticed."""

    n_obs: int | None = None
    """Cells."""
    n_vars: int | None = None
    """Genes."""
    values: dict[str, Names] = Field(default_factory=dict)
    """Values that columns of `obs` must all hold, such as `disease: [normal, type 2 diabetes mellitus]`."""


class CensusCard(Section):
    """Cells of the Census: one file of `config/census`."""

    cells: CensusCells
    expect: CensusExpectations = CensusExpectations()
    about: About = About()


# --- models -------------------------------------------------------------------------------------------------------


class PublishedModel(Section):
    """A model that is published for a release of the Census."""

    kind: Literal["published"]
    file: RemoteFile
    """Its `model.pt`. A file whose sha256 is pinned here may be unpickled where the allow-list does not suffice."""
    organism: Organism
    """Whose cells it was trained on."""
    census_version: Version
    """The release it was trained on."""


class SavedModel(Section):
    """A folder with a model that scvi-tools saved."""

    kind: Literal["path"]
    folder: str
    """The folder with `model.pt`, relative to the folder of the run."""
    trust_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Hash of a `model.pt` that may be unpickled in full, where the allow-list does not suffice."""
    organism: Organism = "mus_musculus"
    """Whose cells it was trained on."""


class FittedModel(Section):
    """A model fitted to the cells by the recipe of the published ones; defaults are the published model's."""

    kind: Literal["fit"]
    n_layers: int = Field(2, ge=1)
    """Hidden layers."""
    n_hidden: int = Field(128, ge=1)
    """Units of each. The published configuration says 512, but the weights have scvi-tools' default."""
    n_latent: int = Field(50, ge=1)
    """Latent dimensions."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the encoder."""
    epochs: int = Field(100, ge=1)
    """Passes over the cells."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    batch_size: int = Field(1024, ge=2)
    """Cells of a step."""
    kl_warmup: int = Field(400, ge=0)
    """Epochs over which the weight of the divergence rises to 1 (scvi-tools' default)."""
    train_share: float = Field(0.9, gt=0, le=1)
    """Share of cells trained on; the rest is for watching."""
    min_genes: int = Field(300, ge=0)
    """Cells with fewer detected genes are left out of training."""
    n_top_genes: int | None = Field(8000, ge=2)
    """Highly variable genes, chosen within each suspension type and assay; leave out or exceed the genes for all."""
    seed: int = Field(0, ge=0)
    """Seed of weights and order."""


class ModelExpectations(Section):
    """What the model must be."""

    n_genes: int | None = None
    """Genes."""
    n_latent: int | None = None
    """Latent dimensions."""
    n_batches: int | None = None
    """Batches."""


class ModelCard(Section):
    """A model of Census cells: one file of `config/models`."""

    model: Annotated[PublishedModel | SavedModel | FittedModel, Field(discriminator="kind")]
    expect: ModelExpectations = ModelExpectations()
    about: About = About()


# --- loading ------------------------------------------------------------------------------------------------------


def load_census_card(name: str, folders: Sequence[str | Path]) -> CensusCard:
    """The card of Census cells `name` from the first of `folders` that has it.

    Raises
    ------
    ConfigError
        If no folder has it, or it is wrong.
    """
    return find_card(CensusCard, "census: no card", name, folders)


def load_model_card(name: str, folders: Sequence[str | Path]) -> ModelCard:
    """The card of model `name` from the first of `folders` that has it.

    Raises
    ------
    ConfigError
        If no folder has it, or it is wrong.
    """
    return find_card(ModelCard, "model: no card", name, folders)


def check_gene_id(gene: str, organism: str) -> str | None:
    """Why `gene` is no Ensembl id of the organism, or None."""
    if re.fullmatch(GENE_IDS[organism] + r"\d{11}(\.\d+)?", gene):
        return None
    for other, prefix in GENE_IDS.items():
        if re.fullmatch(prefix + r"\d{11}(\.\d+)?", gene):
            return f"{gene!r} is a gene of {other}, the cells are those of {organism}"
    return f"{gene!r} is no Ensembl id; give ids such as {GENE_IDS[organism]}00000000001, symbols are not unique"


def _check_gene_ids(genes: tuple[str, ...] | None, organism: str) -> None:
    for gene in genes or ():
        problem = check_gene_id(gene, organism)
        if problem is not None:
            raise ValueError(f"genes: {problem}")
