"""What a gradient case asks: which decoder, which cells, which flow. Read by the planner, so free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
    moves: tuple[MoveSpec, ...] = Field(min_length=1)
    """The perturbations, applied together."""
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
    """Judge each group by a decoder whose heads saw none of its labels: one fit per group."""
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
    answers: tuple[str, ...] = ()
    """Targets that this case answers, such as `paper_b_fig2`."""
    title: str = ""
    """Title in the report."""
