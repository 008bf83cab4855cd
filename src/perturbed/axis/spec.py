"""What an axis case asks: which cells, which model, which two arms. Read by the planner, so free of torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from perturbed.config import Names, Section, with_group
from perturbed.gradients.spec import CellGroup
from perturbed.pathways.judge_spec import JudgeSpec
from perturbed.pathways.spec import EnrichmentSpec

AxisKind = Literal["means", "donors", "discriminant", "given"]
POOLED = "all"
"""The group of all cells, whatever their type."""


class GeneFlow(Section):
    """The flow of one gene among some cells."""

    gene: str
    """Symbol or id of a gene of the model."""
    cells: tuple[str, ...] = ()
    """Values of `groups`; leave out for all cells."""
    sign: Literal[1, -1] = 1
    """Direction whose cosine is told: 1 over-expression, -1 knock-down. Both are drawn."""
    name: str = ""
    """Name of the flow in tables and files, of letters, digits and `_.-`; leave out for the gene's."""
    on_map: bool = False
    """Draw its arrows on the map of the cells, too; one flow of a case can."""
    answers: tuple[str, ...] = ()
    """Targets that this flow answers, such as `paper_b_fig3`."""

    @property
    def label(self) -> str:
        """The flow's name."""
        return self.name or self.gene

    @model_validator(mode="after")
    def _check_label(self) -> GeneFlow:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.label):
            raise ValueError(f"{self.label!r} cannot name a file; give a `name` of letters, digits and _.-")
        return self


class StudyPattern(Section):
    """The study of a donor, where a name holds it."""

    column: str
    """Column of the names, such as `donor_id`."""
    pattern: Annotated[str, with_group("study")]
    """Regular expression that matches the whole of every name, with a group `study`: `(?P<study>…)`."""


class AxisCase(Section):
    """Genes along the axis between two arms of cells in the latent space of one model."""

    cells: str
    """Name of the card of the cells."""
    model: str
    """Name of the card of the model."""
    model_cells: str | None = None
    """Name of the card of the cells that a model of kind `fit` is fitted to; leave out for `cells`."""
    unperturbed: CellGroup
    """Where the axis starts."""
    perturbed: CellGroup
    """Where it ends."""
    groups: str | None = "cell_type"
    """Column of cell types: everything is answered for all cells and for each type with an axis of its own. `null` for
    all cells only."""
    judged: tuple[str, ...] = ()
    """Types to answer for beside all cells; leave out for all with enough cells and donors."""
    donors: str = "donor_id"
    """Column of donors, or of samples where every sample is one animal's: the unit of bootstrap and permutation."""
    study: str | StudyPattern | None = "dataset_id"
    """Column within which donors' labels are exchanged, and which the donors' test adjusts for; `{column, pattern}`
    where the study is a part of a name; `null` for none."""
    keep: dict[str, Names] = Field(default_factory=dict)
    """Only cells with these values of these columns, such as `assay: [10x 3' v3]`."""
    axis: AxisKind = "means"
    """`means`: difference of the mean latents of all cells (the paper's). `donors`: of the means of donors, which
    weigh alike. `discriminant`: that divided by the shrunken covariance within arms. `given`: a file's."""
    given: str | None = None
    """CSV with a column `axis`, one row per latent in order, for `axis: given`."""
    n_cells: int = Field(2000, ge=10)
    """Most cells of each arm and group that are scored, drawn at random; the axis takes all."""
    min_cells: int = Field(50, ge=2)
    """Groups with fewer cells in an arm are left out."""
    min_donors: int = Field(2, ge=1)
    """Groups with fewer donors in an arm are left out. One donor says nothing of the spread among donors: with 1, such
    a group has scores, but no intervals and no p."""
    top: int = Field(200, ge=1)
    """Length of the list of top genes (the paper's 200)."""
    list_groups: Names = (POOLED,)
    """Groups whose rankings go to the enrichment: `all` (the paper's) or types of cells."""
    min_norm: float = Field(0.5, ge=0)
    """Genes whose gradient is shorter than so many times the median gene's take part in no list: a cosine does not see
    the length of a gradient. Measured before softmax, over cells of both arms. 0 keeps all."""
    n_bootstrap: int = Field(1000, ge=100)
    """Bootstrap draws of donors."""
    n_permutations: int = Field(1000, ge=99)
    """Permutations of donors' labels; all of them where there are no more than so many."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the intervals."""
    flows: tuple[GeneFlow, ...] = ()
    """Genes whose flows are drawn."""
    n_steps: int = Field(20, ge=1)
    """Steps of the arrows in a UMAP."""
    delta: float = Field(0.05, gt=0)
    """Length of a step, in units of the latents."""
    gene_sets: tuple[str, ...] = ()
    """Names of the libraries of gene sets that the lists are tested against."""
    enrichment: EnrichmentSpec = EnrichmentSpec()
    """How the lists are tested against gene sets."""
    judge: JudgeSpec = JudgeSpec()
    """Who judges whether the pathways found are relevant, and how."""
    answers: tuple[str, ...] = ()
    """Targets that this case answers, such as `paper_b_islets`."""
    optional: bool = False
    """Leave the case out of `all`, `demo` and the report; `snakemake t2d` and its own targets make it."""
    title: str = ""
    """Title in the report; else the case's name."""
    note: str = ""
    """What a reader should know of the comparison, such as its confounders."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of cells, of bootstrap, permutations, UMAP and the random list."""

    @model_validator(mode="after")
    def _check(self) -> AxisCase:
        if (self.axis == "given") != (self.given is not None):
            raise ValueError("`given`, the file, goes with `axis: given`")
        if set(self.list_groups) != {POOLED} and self.groups is None:
            raise ValueError("`list_groups` names a value of `groups`; give the column")
        if self.judged and self.groups is None:
            raise ValueError("`judged` names values of `groups`; give the column")
        names = [flow.label for flow in self.flows]
        if len(set(names)) < len(names):
            raise ValueError("two flows have the same name; give one of them another `name`")
        if sum(flow.on_map for flow in self.flows) > 1:
            raise ValueError("one flow at most can be `on_map`")
        if any(flow.cells for flow in self.flows) and self.groups is None:
            raise ValueError("the `cells` of a flow are values of `groups`; give the column")
        return self


PAPER_B_AXIS = (
    "paper_b_fig3",
    "paper_b_islets",
    "paper_b_census_umap",
    "paper_b_flow_pcsk1",
    "paper_b_flow_pcsk2",
    "paper_b_flow_acot7",
    "paper_b_flow_fabp5",
    "paper_b_flow_mdh1",
    "paper_b_flow_aldoa",
    "paper_b_enrichment",
    "paper_b_judge",
    "paper_b_table_pathways",
)
"""Targets: the Census part of the decoder paper (Genes 16:1439)."""
