"""The studies: what a config may ask for beyond the benchmark, one model for each kind.

A study reads scores, fitted models or simulations of the run, writes one table and draws one figure. Which fits it
needs follows from its own keys (`perturbed.study_plan`), so that the target of a study runs these and no others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from perturbed.config import Names, Section
from perturbed.interpret.identifiability_spec import IdentifiabilityStudy
from perturbed.interpret.spec import ProbeSpec, ProgramSpec

PAPER_A = (
    *(f"paper_a_fig{number}" for number in (1, 4, 5, 7, 8, 10, 11)),
    *(f"paper_a_table{number}" for number in (1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16)),
    "paper_a_appendix_i",
)
"""Targets: the figures and tables of the PerturbedVAE paper (arXiv 2605.19343)."""

TOP_EXPRESSED = "pearson_delta_ctrl_top_expressed"
"""Score of `Comparison.top_expressed`."""


class _Study(Section):
    title: str
    """Title of the figure."""
    answers: tuple[str, ...] = ()
    """Items of a paper that the study answers, such as `paper_a_table4`; each becomes a target of that name, which
    draws every study that answers it."""


class _Scored(_Study):
    datasets: Names | None = None
    """Datasets of the run; leave out for all. A split that is restricted to some datasets stays restricted."""
    metrics: Names
    """Metrics, one panel each."""
    published: str | None = None
    """A csv of published numbers to print beside ours: `item, method, split, metric, value, sd, source`. Rows of the
    items in `answers` are taken, matched by method (a sweep: by level), split and metric."""


class Comparison(_Scored):
    """Methods beside each other: mean, interval and standard deviation over seeds, floor, ceiling, published number."""

    kind: Literal["comparison"]
    splits: Names
    """Splits of the run, by name."""
    methods: Names
    """Methods, or variants; those that cannot run on a dataset are left out there by name."""
    top_expressed: int | None = Field(None, ge=2)
    """Score also the Pearson correlation of effects on so many genes of highest mean expression in training cells."""


class Conditions(_Study):
    """One metric against another, one point for each test condition."""

    kind: Literal["conditions"]
    datasets: Names | None = None
    """Datasets of the run; leave out for all that the splits allow."""
    splits: Names
    """Splits of the run, by name."""
    methods: Names
    """Methods, one column of panels each."""
    x: str = "r2"
    """Metric across."""
    y: str = "r2_top_de"
    """Metric upright."""


class Sweep(_Scored):
    """One factor varied: variants of a method in order of their level."""

    kind: Literal["sweep"]
    splits: Names
    """Splits of the run, by name."""
    factor: str
    """What is varied, as the axis says it."""
    levels: dict[str, int | float | str] = Field(min_length=2)
    """Level by variant (or method), in the order drawn."""
    baselines: tuple[str, ...] = ()
    """Methods drawn as level lines."""
    history: tuple[str, ...] = ()
    """Terms of the training history whose last value is shown too, such as the KL of a latent block."""
    probe: str | None = None
    """A study of kind `probe` on the same variants, whose accuracy is shown too."""


class Denoising(_Scored):
    """Gain over a baseline against cells per condition: what vanishes as noise goes to 0 is denoising."""

    kind: Literal["denoising"]
    levels: dict[str, Annotated[int, Field(ge=2)]] = Field(min_length=2)
    """Training cells per condition by split."""
    methods: Names
    """Methods whose gain is drawn."""
    baseline: str = "additive"
    """What the gain is over."""
    reference: str = "noise_free_additive"
    """A reference drawn beside the methods where it is scored (simulated data): the baseline without sampling noise."""


class Probe(_Study):
    """Linear probes of the condition from frozen representations, on cells held out of the encoders' training."""

    kind: Literal["probe"]
    dataset: str
    """Dataset of the run."""
    split: str
    """Split of the run; its test cells are of conditions seen in training."""
    methods: Names
    """Methods whose representation is probed."""
    options: ProbeSpec = ProbeSpec()


class Programs(_Study):
    """Latent programs: hit map, graph, names, enrichment and stability over seeds, with permutation nulls."""

    kind: Literal["programs"]
    dataset: str
    """Dataset of the run."""
    split: str
    """Split of the run; the first fold is taken."""
    method: str
    """A method with latent programs."""
    options: ProgramSpec = ProgramSpec()


class Identifiability(_Study):
    """Recovery of planted latents, one factor varied at a time."""

    kind: Literal["identifiability"]
    seeds: tuple[int, ...] | None = None
    """Seeds of data and training; leave out for those of the run."""
    options: IdentifiabilityStudy = IdentifiabilityStudy()


class LatentMap(_Study):
    """t-SNE of a latent block of held-out cells, coloured by condition and by what the cells are."""

    kind: Literal["latent_map"]
    dataset: str
    """Dataset of the run."""
    split: str
    """Split of the run; the test cells of its first fold are drawn."""
    methods: Names
    """Methods whose latents are drawn, one row of panels each."""
    latent: Literal["z_iota", "encoder"] = "z_iota"
    """The background latents, or the output of the encoder; neither ever sees the condition."""
    colours: Names = ("perturbation",)
    """Columns of `obs` that colour the cells, one panel each."""
    n_cells: int = Field(1500, ge=10)
    """At most so many cells, drawn with `seed`."""
    perplexity: float = Field(30.0, gt=1)
    """Perplexity of the t-SNE."""
    seed: int = 0
    """Seed of the draw of cells and of the t-SNE."""


Study = Annotated[
    Comparison | Conditions | Sweep | Denoising | Probe | Programs | Identifiability | LatentMap,
    Field(discriminator="kind"),
]

SCORED = ("comparison", "conditions", "sweep", "denoising")
"""Kinds whose table comes from scores."""
STUDY_KINDS = (*SCORED, "probe", "programs", "identifiability", "latent_map")
"""Every kind of study."""
