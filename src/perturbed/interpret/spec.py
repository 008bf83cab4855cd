"""Options of the probe and of the programs; free of torch, so that a run can be planned from them."""

from __future__ import annotations

from pydantic import Field

from perturbed.config import Section


class ProbeSpec(Section):
    """A linear probe of the condition from frozen representations."""

    n_folds: int = Field(5, ge=2)
    """Stratified folds over the probed cells; each cell is classified once, by a probe that did not see it."""
    min_cells: int = Field(10, ge=2)
    """Conditions with fewer probed cells are left out; at least `n_folds`."""
    max_cells: int | None = Field(None, ge=2)
    """At most so many cells of each condition, drawn by seed; cap it where conditions differ much, or to save time."""
    penalties: tuple[float, ...] = Field((0.001, 0.01, 0.1), min_length=1)
    """Inverse strengths C of the ridge penalty to choose from, by an inner cross-validation on the probe's training
    folds; a single one is taken as it is."""
    inner_folds: int = Field(3, ge=2)
    """Folds of that inner cross-validation."""
    dimensions: tuple[int, ...] = ()
    """Also probe every wider representation reduced to its so many leading principal components (fitted on the probe's
    training folds), so that representations are compared at equal width."""
    raw_genes: bool = True
    """Probe the features' genes themselves, too: what a linear probe can get without any representation."""
    n_permutations: int = Field(1000, ge=20)
    """Permutations of the held-out labels behind the chance level."""
    n_bootstrap: int = Field(2000, ge=100)
    """Bootstrap draws over conditions behind the interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the interval."""
    seed: int = 0
    """Seed of folds, caps, permutations and bootstrap."""


class ProgramSpec(Section):
    """Programs of response latents: what belongs to them, what they are called and whether they are there again."""

    prune: float = Field(0.25, ge=0)
    """Edges of smaller absolute standardised weight are pruned (paper: 0.25)."""
    n_top_genes: int = Field(50, ge=2)
    """Genes of a program's list: those that move most with its latent."""
    min_set: int = Field(5, ge=1)
    """Gene sets with fewer of the model's genes are not tested."""
    max_set: int = Field(500, ge=1)
    """Nor are those with more."""
    n_bins: int = Field(10, ge=1)
    """Bins of mean expression within which random lists are drawn; 1 matches in size only."""
    n_permutations: int = Field(1000, ge=20)
    """Random gene lists, and permutations of the perturbed genes, behind every null."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """False discovery rate below which a set counts as enriched."""
    seed: int = 0
    """Seed of the nulls."""
