"""The configuration of a whole run: which cells, methods, splits, seeds and studies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from perturbed.axis.spec import AxisCase
from perturbed.config import (
    EvaluationSpec,
    FeatureSpec,
    Names,
    Section,
    SplitSpec,
    StatisticsSpec,
    UnseenCombo,
    as_tuple,
    parse,
)
from perturbed.gradients.spec import GradientCase
from perturbed.models.spec import Role
from perturbed.study_config import Study

NamesOrNone = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


_Seeds = tuple[int, ...]


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    wrong = [seed for i, seed in enumerate(seeds) if seed < 0 or seed in seeds[:i]]
    if wrong:
        raise ValueError(f"{wrong[0]} is negative or comes twice; give each seed once, from 0")
    return seeds


def _check_folder(path: str) -> str:
    if path.startswith("-") or not re.fullmatch(r"[\w./@%+=:,-]+", path):
        raise ValueError(f"{path!r} holds what a shell acts on; use letters, digits, `.`, `/`, `_` and `-`")
    return path


Folder = Annotated[str, AfterValidator(_check_folder)]
"""A path that stands in commands as it is."""


class Variant(Section):
    """A method of the run under another name: a file of `config/methods` with some hyper-parameters changed."""

    method: str
    """The method's file."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters that differ from the file, and from `method_params` of that method."""
    files: dict[Role, str] = Field(default_factory=dict)
    """Side files of the variant's own, by what they hold, in place of the dataset's, such as `cell_embedding:
    "embeddings/{dataset}/uce.h5ad"`; `{dataset}` is filled in. Without the file the variant is left out by name."""
    title: str | None = None
    """Name in tables and figures; else the variant's name."""


class RunConfig(Section):
    """A whole run. `dataset`, `methods`, `splits` and `seeds` span the grid."""

    dataset: NamesOrNone = ("simulation", "simulation_epistasis")
    """One or more cards of `config/datasets` by name. Swap it in one word: `snakemake --config dataset=NAME`.
    `[]` for a run of `axes` alone, with `methods: []` and `splits: {}`."""
    methods: NamesOrNone = ("no_change", "mean_effect", "additive", "matching_mean", "pca_ridge", "perturbedvae")
    """Files of `config/methods` by name."""
    seeds: Annotated[_Seeds, BeforeValidator(as_tuple), AfterValidator(_check_seeds), Field(min_length=1)] = (0, 1, 2)
    """Training seeds; methods without randomness run once."""
    splits: dict[str, SplitSpec] = {"zero_shot": UnseenCombo(kind="unseen_combo")}  # noqa: RUF012 — pydantic copies it
    """The splits by name."""
    features: FeatureSpec = FeatureSpec()
    dataset_features: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keys of `features` that differ for a dataset, by dataset, such as `{kang2018: {n_hvg: 2000}}`; those of datasets
    that the run does not have are not used."""
    method_params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Hyper-parameters of this run that differ from the method's file, by method."""
    variants: dict[str, Variant] = Field(default_factory=dict)
    """Methods under other names with other hyper-parameters, for ablations and sweeps; name them in `methods`."""
    method_seeds: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """How many of the seeds a method runs with, by method, where not all: for methods that are slow."""
    evaluation: EvaluationSpec = EvaluationSpec()
    statistics: StatisticsSpec = StatisticsSpec()
    studies: dict[str, Study] = Field(default_factory=dict)
    """Studies by name: each makes a table and a figure of its own, and adds the fits that it needs to the run's."""
    gradients: dict[str, GradientCase] = Field(default_factory=dict)
    """Gradient cases by name: each fits the decoder it asks, follows its gradients and judges them. Cases of
    datasets that the run does not have are left out."""
    axes: dict[str, AxisCase] = Field(default_factory=dict)
    """Axis cases by name: gene scores of a Census decoder between two arms of cells, their pathways and a judge. They
    need no dataset of the benchmark."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the torch models train; `auto` takes a GPU where there is one."""
    threads: int = Field(1, ge=1)
    """Threads of one training job."""
    memory_gb: float | None = Field(None, gt=0)
    """Training cells that take more GB than this are read from disk while a method that can do so trains. It takes them
    in another order then, so this is the config's and not the machine's; `null`: half of the method's own `mem_mb`."""
    results: Folder = "results"
    """Folder of everything that is computed. Give each config its own."""
    data: Folder = "data"
    """Folder of downloads; share it between configs."""
    mirror: str | None = None
    """A folder with files downloaded before, looked up by name and hash; for clusters without internet."""
    allow_unpinned: bool = False
    """Accept downloads whose hash nobody has pinned yet; their hash is printed for pinning."""
    cards: Names = ("config/datasets",)
    """Folders searched for dataset cards, in order; add your own."""
    method_files: Names = ("config/methods",)
    """Folders searched for method files, in order; add your own."""
    census_cards: Names = ("config/census",)
    """Folders searched for cards of Census cells, in order; add your own."""
    model_cards: Names = ("config/models",)
    """Folders searched for cards of models of Census cells, in order; add your own."""
    gene_set_cards: Names = ("config/gene_sets",)
    """Folders searched for cards of gene sets, in order; add your own."""


def load_config(value: Mapping[str, Any], where: str = "config") -> RunConfig:
    """The run's configuration from a mapping, such as Snakemake's `config`."""
    return parse(RunConfig, dict(value), where)


def features_of(config: RunConfig, dataset: str) -> FeatureSpec:
    """The features of a dataset: the run's section, and what differs for it.

    Raises
    ------
    ConfigError
        If what differs is wrong.
    """
    changed = {**config.features.model_dump(), **config.dataset_features.get(dataset, {})}
    return parse(FeatureSpec, changed, f"config: dataset_features.{dataset}")
