"""Options of the pathway stages and cards of gene-set libraries. Read by the planner, so free of torch and scanpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from perturbed.config import Names, Section, find_card, with_group
from perturbed.data.cards import RemoteFile

Background = Literal["model", "genome"]
Test = Literal["ora", "rank", "gsea"]


LISTS = (
    "gradient_unperturbed",
    "gradient_perturbed",
    "gradient_logits_unperturbed",
    "gradient_logits_perturbed",
    "median_decoded",
    "pseudobulk",
    "axis_correlation",
    "random",
)
"""Lists that an axis case can have; it lacks some where its cells came without counts or with too few donors."""
CONTROL = "random"
"""The list of random genes: nothing that is found in it means anything."""


class GeneSetUrl(Section):
    """A library on the web."""

    kind: Literal["url"]
    file: RemoteFile
    """The file; of an archive, its `member`."""


class GeneSetPath(Section):
    """A library on this machine."""

    kind: Literal["path"]
    path: str
    """Its path, relative to the folder snakemake runs in; may be gzipped."""


GeneSetSource = Annotated[GeneSetUrl | GeneSetPath, Field(discriminator="kind")]


class IdTable(Section):
    """A table that leads from one kind of gene id to another; a pair per row."""

    source: GeneSetSource
    """The table; may be gzipped."""
    separator: Literal[",", "\t"] = "\t"
    """What parts its columns."""
    source_column: str | int = 0
    """Column of the ids to translate: a name where the table has a header, else its number from 0."""
    target_column: str | int = 1
    """Column of what they become, given the same way. Rows without a target are skipped."""
    many: Literal["all", "drop"] = "all"
    """An id with several targets becomes all of them (human INS is mouse Ins1 and Ins2), or is dropped. Counted as
    ambiguous either way."""

    @model_validator(mode="after")
    def _check_columns(self) -> IdTable:
        if isinstance(self.source_column, str) != isinstance(self.target_column, str):
            raise ValueError("source_column and target_column must both be names or both be numbers")
        if any(isinstance(c, int) and c < 0 for c in (self.source_column, self.target_column)):
            raise ValueError("columns are numbered from 0")
        return self


class GeneSetAbout(Section):
    """What a reader of the report should know of a library."""

    title: str = ""
    licence: str = ""
    doi: str = ""
    note: str = ""


class GeneSetCard(Section):
    """One library of gene sets."""

    source: GeneSetSource
    format: Literal["gmt"] = "gmt"
    """Lines of name, description, genes, by tabs."""
    ids: Literal["symbol", "entrez", "ensembl"] = "symbol"
    """What names the genes. Entrez ids need a `map`; Ensembl ids a `map` or the data's own table of genes."""
    organism: str
    """The organism whose genes these are, such as `mouse`."""
    date: str = ""
    """Date or version of the library, for the report."""
    name_pattern: Annotated[str, with_group("name")] | None = None
    """Regular expression that matches the whole of a set's name, with a group `name` (what is shown) and perhaps `id`
    (kept as description, and appended where two sets share a name). Leave out to keep names as they are."""
    map: IdTable | None = None
    """From the library's ids to symbols of `organism`."""
    orthologs: IdTable | None = None
    """From symbols of `organism` to those of the data's organism; leave out where they are the same."""
    ignore_case: bool = False
    """Spell symbols as the data's table of genes does where they differ from it in case only; exact matches go first,
    and symbols that match several are left. For libraries that write mouse genes in capitals; it is no orthology."""
    sorted_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the library's normal form (sets by name, genes by name, descriptions left out), for sources that export
    the same library in a changing order."""
    about: GeneSetAbout = GeneSetAbout()

    @model_validator(mode="after")
    def _check_ids(self) -> GeneSetCard:
        if self.ids == "entrez" and self.map is None:
            raise ValueError("Entrez ids need a `map` to symbols")
        if self.ids == "symbol" and self.map is not None:
            raise ValueError("ids are symbols already; leave `map` out, or say entrez or ensembl")
        return self


def load_gene_set_card(name: str, folders: Sequence[str | Path]) -> GeneSetCard:
    """The card of library `name` from the first of `folders` that has it.

    Raises
    ------
    ConfigError
        If no folder has it, or it is wrong.
    """
    return find_card(GeneSetCard, "gene sets: no card", name, folders)


class EnrichmentSpec(Section):
    """How lists of genes are tested against gene sets."""

    lists: Names = (
        "gradient_unperturbed",
        "gradient_perturbed",
        "median_decoded",
        "pseudobulk",
        "axis_correlation",
        "random",
    )
    """Lists of the rankings to test, in the order of the figure. Those that an axis case may lack (such as `pseudobulk`
    without counts) are left out where it does, and that is said; any other that the rankings lack is an error."""
    methods: tuple[Test, ...] = Field(("ora", "rank"), min_length=1)
    """`ora`: over-representation among the top genes, the paper's. `rank`: Mann–Whitney test of all ranked genes.
    `gsea`: GSEA's weighted running sum (gseapy's prerank)."""
    backgrounds: tuple[Background, ...] = Field(("model", "genome"), min_length=1)
    """Backgrounds of `ora`, the first the primary one. `model`: genes that the ranking could have put on top.
    `genome`: all genes of the library, or of a given list of genes."""
    model_genes: Literal["kept", "all"] = "kept"
    """The model's background: genes that the ranking kept, or all of its genes."""
    annotated_only: bool = True
    """Count only genes that are in some set of the library, in list and background alike, as WebGestalt does. False
    counts all, which takes genes that nobody has studied as evidence."""
    min_size: int = Field(5, ge=1)
    """Sets with fewer genes in the background are not tested (WebGestalt's default)."""
    max_size: int = Field(2000, ge=1)
    """Nor are those with more (WebGestalt's default)."""
    fdr: float = Field(0.05, gt=0, lt=1)
    """False discovery rate up to which a pathway counts as significant."""
    top: int = Field(10, ge=1)
    """Pathways of each list that are shown and judged."""
    rank_by: Literal["absolute", "signed"] = "absolute"
    """`rank` and `gsea`: high |score| (one-sided, as the lists are made), or score with its sign (two-sided)."""
    n_null: int = Field(200, ge=20)
    """Random lists of like expression behind every empirical number."""
    n_bins: int = Field(20, ge=1)
    """Bins of equal numbers of genes by mean expression within which random lists are drawn; 1 matches in size only."""
    n_permutations: int = Field(1000, ge=100)
    """Permutations of `gsea`."""
    seed: int = 0
    """Seed of random lists and permutations."""

    @model_validator(mode="after")
    def _check(self) -> EnrichmentSpec:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} is above max_size {self.max_size}")
        for key in ("lists", "methods", "backgrounds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names something twice")
        return self
