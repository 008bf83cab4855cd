"""Dataset cards: everything known of a dataset in one YAML file of `config/datasets`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from perturbed.config import PLAIN_NAME, Section, find_card

Strings = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern


Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_check_pattern)], ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
]


def _refuse_passwords(urls: tuple[str, ...]) -> tuple[str, ...]:
    if any("@" in urlsplit(url).netloc for url in urls):
        raise ValueError("an address names a user or password; download the file by hand and give it as `mirror`")
    return urls


class RemoteFile(Section):
    """One file to download."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    """Name on disk."""
    urls: Annotated[Strings, Field(min_length=1), AfterValidator(_refuse_passwords)]
    """Addresses of the same bytes, tried in order; without user or password, since logs and records show them."""
    bytes: int | None = None
    """Size, where known; a reply of another size is refused."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Preferred hash."""
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")
    """Hash where no sha256 is published."""
    member: str | None = None
    """The file wanted inside the archive; leave out where the file is no archive."""
    member_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the member, for archives built anew for each request."""
    role: Literal["matrix", "genes", "cells", "annotation"] | None = None
    """What the file is, where a Matrix Market file comes with tables whose names do not say so; then every file of the
    card needs one. `cells` has a row per column of the matrix, in its order; `annotation` is joined to it by name."""
    key: str | None = None
    """Column of the names of genes or cells, for a table with a header; without one the first column holds them."""


class UrlSource(Section):
    """Files on the web."""

    kind: Literal["url"]
    files: Annotated[tuple[RemoteFile, ...], Field(min_length=1)]
    """The files; one h5ad, or a matrix with its tables."""


class PathSource(Section):
    """An h5ad file on this machine."""

    kind: Literal["path"]
    path: str
    """Its path, relative to the folder snakemake runs in."""


class SimulationSource(Section):
    """Simulated cells with planted truth."""

    kind: Literal["simulation"]
    generator: Literal["scm", "epistasis"]
    """`scm`: PerturbedVAE's own model class. `epistasis`: outside of it."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The generator's parameters; see `perturbed simulate --help`."""
    seed: int = 0
    """Seed of every draw."""


Source = Annotated[UrlSource | PathSource | SimulationSource, Field(discriminator="kind")]


class Keys(Section):
    """Where the source keeps what we need."""

    perturbation: str = "perturbation"
    """`obs` column of the perturbation label."""
    control: Strings = ("control",)
    """Labels of control cells (the empty string is allowed)."""
    delimiter: str = "+"
    """What joins the genes of a combination in a label."""
    filler: Strings = ()
    """Placeholders inside a combination that stand for no gene, such as `ctrl` in `KLF1+ctrl`."""
    strip: Patterns = ()
    """Regular expressions whose matches are removed from every label first (`re.sub`), such as the name of the guide's
    vector in `SPI1_pDS255`; `control`, `rename` and `delimiter` then see what is left."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Labels spelt otherwise than their parts say: from the source's spelling to ours."""
    genes_with_delimiter: Strings = ()
    """Gene names that hold the delimiter themselves; labels are matched against them first."""
    counts: str | None = "X"
    """Where raw counts lie: `X`, the name of a layer, or null where the source has none."""
    symbol: str | None = None
    """`var` column of gene symbols; null where `var_names` are symbols."""
    gene_id: str | None = None
    """`var` column of stable gene ids; null where there is none."""
    context: str | None = None
    """`obs` column of the context (cell type, cell line) for transfer splits."""
    keep: dict[str, str] = Field(default_factory=dict)
    """Further `obs` columns to carry along: our name to the source's, such as `batch: gemgroup`."""
    drop: dict[str, Strings] = Field(default_factory=dict)
    """Cells to drop: `obs` column to values; a cell is dropped where the column, as the source spells it, equals one.
    A missing value is spelt `nan`."""
    drop_matching: dict[str, Patterns] = Field(default_factory=dict)
    """Cells to drop by pattern: `obs` column to regular expressions; a cell is dropped where one of them matches the
    whole value (`re.fullmatch`). For columns whose values are only known in part."""
    drop_genes: Patterns = ()
    """Features that are no genes, such as guide barcodes counted with them, which would give the label away: regular
    expressions that match the whole of a `var_names` entry (`re.fullmatch`). Dropped before depth is computed."""


class Preparation(Section):
    """Quality control and normalisation, all of it per cell, so that no statistic over all cells is in the file."""

    normalise: Literal["log1p", "none"] = "log1p"
    """`log1p`: counts to `target_sum` per cell, then log(1+x). `none`: `X` is log-normalised already."""
    target_sum: float = Field(1e4, gt=0)
    """Fixed depth of the normalisation."""
    min_counts: int = Field(0, ge=0)
    """Cells with fewer counts are dropped."""
    min_genes: int = Field(0, ge=0)
    """Cells with fewer detected genes are dropped."""
    max_genes: int | None = Field(None, ge=1)
    """Cells with more detected genes are dropped (doublets)."""
    max_mito: float = Field(1.0, ge=0, le=1)
    """Cells with a larger share of mitochondrial counts are dropped."""
    min_cells_per_gene: int = Field(0, ge=0)
    """Genes the source detected in fewer cells are dropped; 0 keeps all, and keeps the file free of test cells'
    counts."""
    min_cells_per_perturbation: int = Field(1, ge=1)
    """Perturbations with fewer cells are dropped."""
    upstream_genes: bool = False
    """True where the source chose its genes on all cells; reports then say so."""


class Expectations(Section):
    """What the data must hold after reading, so that a changed file is noticed."""

    n_obs: int | None = None
    n_vars: int | None = None
    n_kept: int | None = None
    """Cells left after `keys.drop` and `keys.drop_matching`, before quality control."""
    n_genes: int | None = None
    """Genes left after `keys.drop_genes`, before quality control."""
    n_control: int | None = None
    """Control cells."""
    n_groups: int | None = None
    """Distinct canonical perturbations, control included."""
    n_single: int | None = None
    n_double: int | None = None
    values: Literal["counts", "log1p"] | None = None
    """Kind of the values that `keys.counts` (or `X`) holds."""
    x_sum: float | None = None
    """Sum over the matrix that `keys.counts` names, over `X` where it names none."""
    stage: Literal["raw", "prepared"] = "raw"
    """Whether the cell and gene numbers hold before (`raw`) or after (`prepared`) quality control."""


class About(Section):
    """What a reader of the report should know."""

    title: str = ""
    organism: str = ""
    cell_line: str = ""
    modality: str = ""
    accession: str = ""
    doi: str = ""
    licence: str = ""
    note: str = ""


class SideFiles(Section):
    """Files that some methods need beside the cells, by what they hold; paths relative to the folder of the run."""

    gene_sets: str | None = None
    """Gene sets with gene names as in `var_names`: a GMT file, or the name of a card in `config/gene_sets`, which is
    then fetched. Simulated data bring their planted ones."""
    gene_graph: str | RemoteFile | None = None
    """Graph of genes (CSV: source, target, importance): a file, or where it is on the web, with `member` if packed."""
    gene_embedding: str | None = None
    """Vectors of genes: h5ad with genes in rows, or CSV with the gene in the first column."""
    cell_embedding: str | None = None
    """Vectors of cells: h5ad or CSV by cell name, made by a model that saw no label of these cells."""


def names_card(gene_sets: str) -> bool:
    """Whether `files.gene_sets` is the name of a card; a path has a dot or a slash."""
    return re.fullmatch(PLAIN_NAME, gene_sets) is not None


class Card(Section):
    """One dataset."""

    source: Source
    keys: Keys = Keys()
    prepare: Preparation = Preparation()
    expect: Expectations = Expectations()
    files: SideFiles = SideFiles()
    anonymous_genes: bool = False
    """True where the genes' names say nothing, so that nothing known of genes can be used."""
    about: About = About()

    @property
    def provides(self) -> set[str]:
        """What the data offer of that which a method may require."""
        offered = {role for role, path in self.files if path is not None}
        if isinstance(self.source, SimulationSource):
            offered.add("gene_sets")
        if self.keys.counts is not None:
            offered.add("counts")
        if not self.anonymous_genes:
            offered.add("gene_names")
        return offered


def load_card(name: str, folders: Sequence[str | Path]) -> Card:
    """The card of dataset `name` from the first of `folders` that has it.

    Raises
    ------
    ConfigError
        If no folder has it, or it is wrong.
    """
    return find_card(Card, "dataset: no card", name, folders)
