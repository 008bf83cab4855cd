"""What a gradient case asks: which decoder, which cells, which flow. Read by the planner, so free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from perturbed.config import Names, Section


class CellGroup(Section):
    """Cells by the values of a column."""

    column: str = "perturbation"
    """Column of the prepared cells: `perturbation`, `context`, or one of the card's `keys.keep`."""
    values: Names
    """Its values."""


class MoveSpec(Section):
    """One perturbation of the decoder's outputs."""

    targets: Names
    """Genes or heads; their gradients are averaged."""
    sign: Literal[1, -1] = 1
    """1 over-expression, -1 knock-down."""


class GradientCase(Section):
    """One question to one decoder."""

    dataset: str
    """Dataset of the run."""
    split: str
    """Split whose training cells the decoder saw; its test cells are those that heads are judged on."""
    method: str
    """The decoder: an `nb_vae` or `perturbedvae` method or variant of the run."""
    moves: tuple[MoveSpec, ...] = ()
    """The perturbations, applied together."""
    screen: bool = False
    """Instead of `moves`: every perturbation whose genes are all outputs of the decoder, each against its own shift."""
    unperturbed: CellGroup
    """Where flows start."""
    perturbed: CellGroup | None = None
    """Where they should end; leave out where there is a time instead."""
    time: str | None = None
    """Column of a time or order, to compare the flow with its local gradient."""
    groups: str | None = None
    """Column of cell types (or the like): every answer is also given for each."""
    replicates: str | None = None
    """Column of donors or replicates, the unit of the bootstrap; without it the unit is the cell, which is said."""
    masked_groups: bool = False
    """Judge each group of `judged` by a decoder whose heads saw none of its labels: one fit per group."""
    judged: tuple[str, ...] = ()
    """Groups to judge; leave out for all with enough cells. Needed where groups are masked, because the fits are
    planned before any data are read."""
    seeds: int | None = Field(None, ge=1)
    """How many of the run's seeds to fit; leave out for as many as the method runs with."""
    min_cells: int = Field(20, ge=2)
    """Groups with fewer cells in either arm are left out."""
    genes: tuple[str, ...] = ()
    """Genes decoded along the way and shown."""
    n_steps: int = Field(20, ge=1)
    """Steps of the trajectories."""
    delta: float = Field(0.05, gt=0)
    """Step size (the paper's 0.05)."""
    unit: bool = False
    """Steps of equal length, where gradients of different decoders are to be compared."""
    manifold: bool = False
    """Keep trajectories where cells are."""
    n_random_genes: int = Field(200, ge=0)
    """Random genes, matched in mean and variance, that a target gene is ranked among."""
    n_bootstrap: int = Field(1000, ge=100)
    """Bootstrap draws."""
    n_permutations: int = Field(1000, ge=99)
    """Permutations of labels."""
    untrained: bool = True
    """Ask a decoder with fresh weights the same."""
    umap: bool = False
    """Draw a UMAP of the latents too, with arrows from cells to where `n_steps` steps take them."""
    answers: tuple[str, ...] = ()
    """Targets that this case answers, such as `paper_b_celegans`."""
    title: str = ""
    """Title in the report; else the case's name."""

    @model_validator(mode="after")
    def _check(self) -> GradientCase:
        if self.screen == bool(self.moves):
            raise ValueError("give either `moves` or `screen: true`")
        if self.screen and (self.time or self.masked_groups or self.umap or self.perturbed):
            raise ValueError("a screen takes no `perturbed`, `time`, `masked_groups` or `umap`")
        if not self.screen and self.perturbed is None and self.time is None:
            raise ValueError("say where the flow should lead: `perturbed` or `time`")
        if self.masked_groups and not (self.groups and self.judged):
            raise ValueError("masked_groups needs `groups`, the column, and `judged`, the groups")
        if self.judged and not self.groups:
            raise ValueError("`judged` names groups of a column; name it in `groups`")
        return self


PAPER_B = (
    "paper_b_irf8_flow",
    "paper_b_irf8_umap",
    "paper_b_cardiotoxin",
    "paper_b_celegans",
    "paper_b_quality",
)
"""Targets: the figures of the decoder paper (Genes 16:1439) whose data are a case here."""
