"""What a run consists of: the grid of jobs, the files they make and the slice of the configuration each depends on.

Snakemake asks here for targets and `params`; nothing in this module computes or reads data. A rule's parameters are
exactly the slice it uses, as JSON, so that one changed key reruns only what depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from perturbed.axis_plan import AxisPlan
from perturbed.config import check_plain
from perturbed.data.cards import Card, SimulationSource, load_card
from perturbed.errors import ConfigError, suggest
from perturbed.gradient_plan import GradientPlan
from perturbed.models.spec import MethodSpec, load_method_spec
from perturbed.provenance import DRAWN
from perturbed.resource_plan import ResourcePlan, grow
from perturbed.run_config import RunConfig, features_of, load_config
from perturbed.side_plan import SidePlan
from perturbed.study_plan import Job, StudyPlan

if TYPE_CHECKING:
    import pandas as pd

RUN_FIGURES = ("overview", "calibration")
"""Figures of the whole run."""
SPLIT_FIGURES = ("contrasts", "strata", "scatter", "hardest_easiest", "embedding", "training_curves")
"""Figures drawn for each dataset and split."""


def as_json(value: Any, *, sort: bool = True) -> str:
    """Compact JSON: equal slices are equal strings. Keys are sorted but where their order means something."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"))


class Plan:
    """A validated run.

    Parameters
    ----------
    config
        The configuration as a mapping, such as Snakemake's `config`.

    Raises
    ------
    ConfigError
        If a key, dataset, method or metric is unknown or a value is wrong; always one line.
    """

    grow = staticmethod(grow)

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: RunConfig = load_config(config)
        self._check_spelling()
        self.cards: dict[str, Card] = {name: load_card(name, self.config.cards) for name in self.config.dataset}
        self.side = SidePlan(self)
        self.studies = StudyPlan(self)
        self.gradients = GradientPlan(self)
        self.axes = AxisPlan(self)
        self.resources = ResourcePlan(self)
        self._scored = tuple(dict.fromkeys([*self.config.methods, *self.studies.methods]))
        wanted = dict.fromkeys([*self._scored, *self.gradients.methods])
        self.methods: dict[str, MethodSpec] = {name: self._method(name) for name in wanted}
        self.methods |= self.gradients.masked_methods(self.methods)
        self._check_names()
        self.studies.check()
        self.gradients.check()
        self.axes.check()

    def _method(self, name: str) -> MethodSpec:
        check_plain("methods", name)  # studies and cases name methods, too
        variant = self.config.variants.get(name)
        base = name if variant is None else variant.method
        spec = load_method_spec(base, self.config.method_files)
        params = {**spec.params, **self.config.method_params.get(base, {})}
        if variant is None:
            return spec.model_copy(update={"params": params})
        changed = {"params": {**params, **variant.params}, "files": {**spec.files, **variant.files}}
        return spec.model_copy(update={**changed, "title": variant.title or name})

    def _check_spelling(self) -> None:
        """Names become wildcards and folders, so they must be plain."""
        config = self.config
        named: dict[str, Iterable[str]] = {"dataset": config.dataset, "methods": config.methods}
        named |= {"splits": config.splits, "studies": config.studies, "variants": config.variants}
        named |= {"gradients": config.gradients, "axes": config.axes}
        for key, names in named.items():
            for name in names:
                check_plain(key, name)

    def _check_names(self) -> None:
        from perturbed.evaluation.registry import METRICS

        config = self.config
        files = {path.stem for folder in config.method_files for path in Path(folder).glob("*.yaml")}
        for name in config.variants:
            if name in files:
                raise ConfigError(f"config: variants: {name!r} is a method's name already; choose another")
        known = {*config.methods, *files, *config.variants}
        named: dict[str, Iterable[str]] = {
            "method_params": config.method_params,
            "method_seeds": config.method_seeds,
            "statistics.baselines": config.statistics.baselines,
        }
        named |= {f"splits.{name}.methods": spec.methods or () for name, spec in config.splits.items()}
        for key, names in named.items():
            for name in names:
                if name not in known:
                    raise ConfigError(f"config: {key}: no method {name!r}; {suggest(name, known)}")
        for name, spec in config.splits.items():
            for dataset in spec.datasets or ():
                if dataset not in config.dataset:
                    suggestion = suggest(dataset, config.dataset)
                    raise ConfigError(f"config: splits.{name}.datasets: no dataset {dataset!r}; {suggestion}")
        for name in config.dataset_features:
            features_of(config, name)
        for key in ("primary_method", "primary_baseline"):
            name = getattr(config.statistics, key)
            if name not in known:
                raise ConfigError(f"config: statistics.{key}: no method {name!r}; {suggest(name, known)}")
        wanted = () if config.evaluation.metrics == "all" else config.evaluation.metrics
        metrics = [("evaluation.metrics", name) for name in wanted]
        for key, name in [*metrics, ("statistics.primary_metric", config.statistics.primary_metric)]:
            if name not in METRICS:
                raise ConfigError(f"config: {key}: no metric {name!r}; {suggest(name, METRICS)}")
        if config.dataset and not config.splits:
            raise ConfigError("config: splits: at least one split is needed")
        if not (config.dataset or config.axes):
            raise ConfigError("config: dataset: name a dataset, or give `axes`")

    # --- the grid -------------------------------------------------------------------------------------------------

    @cached_property
    def simulated(self) -> list[str]:
        """Datasets that are simulated."""
        return [name for name, card in self.cards.items() if isinstance(card.source, SimulationSource)]

    @cached_property
    def fetched(self) -> list[str]:
        """Datasets that come from files."""
        return [name for name in self.cards if name not in self.simulated]

    def jobs(self, dataset: str | None = None, split: str | None = None) -> Iterator[Job]:
        """Every fit of the run, in a fixed order; methods without randomness run for the first seed only."""
        for job in self._jobs:
            if dataset in (None, job.dataset) and split in (None, job.split):
                yield job

    @cached_property
    def _jobs(self) -> tuple[Job, ...]:
        """The grid of the benchmark, and what the studies need besides."""
        of_studies = [job for study in self.config.studies for job in self.studies.jobs(study)]
        return tuple(dict.fromkeys([*self._benchmark, *of_studies]))

    @cached_property
    def _benchmark(self) -> tuple[Job, ...]:
        config = self.config
        return tuple(
            job
            for name in config.dataset
            for key in config.splits
            for job in self.cell(name, key, self.methods_of(key))
        )

    def methods_of(self, split: str) -> list[str]:
        """Methods of the benchmark that a split is meant for."""
        only = self.config.splits[split].methods
        return [method for method in self.config.methods if only is None or method in only]

    def cell(self, dataset: str, split: str, methods: Iterable[str]) -> Iterator[Job]:
        """Fits of these methods on one dataset and split, without those that cannot run there."""
        for fold in range(self.config.splits[split].n_folds if self.allows(dataset, split) else 0):
            for method in methods:
                if not self.side.lacks(method, dataset):
                    for seed in self.seeds(method):
                        yield Job(dataset, split, fold, method, seed)

    def allows(self, dataset: str, split: str) -> bool:
        """Whether the split is meant for the dataset."""
        datasets = self.config.splits[split].datasets
        return datasets is None or dataset in datasets

    def seeds(self, method: str) -> tuple[int, ...]:
        """The seeds a method runs with."""
        seeds = self.config.seeds[: self.config.method_seeds.get(self._base(method))]
        return seeds if self.methods[method].stochastic else seeds[:1]

    def _base(self, method: str) -> str:
        """The name under which `method_seeds` holds a method: its own, or that of the method it is a variant of."""
        variant = self.config.variants.get(method)
        return method if variant is None or method in self.config.method_seeds else variant.method

    def left_out(self) -> list[str]:
        """One line for each method or case of the run that cannot run on one of its datasets, with the reason."""
        return [*self.side.left_out(), *self.gradients.left_out]

    def tabulate_capabilities(self) -> pd.DataFrame:
        """Which method runs on which dataset, and what is missing where it does not."""
        from perturbed.models.capabilities import tabulate

        return tabulate({name: self.methods[name] for name in self._scored}, self.cards)

    @property
    def environments(self) -> list[str]:
        """Environments of their own that methods of the run need."""
        return sorted({spec.environment for spec in self.methods.values()} - {""})

    # --- paths ----------------------------------------------------------------------------------------------------

    def data(self, file: str) -> str:
        """Pattern of a file that depends on the dataset alone."""
        return f"{self.config.data}/{{dataset}}/{file}"

    def fold(self, file: str) -> str:
        """Pattern of a file that depends on dataset, split and fold."""
        return f"{self.config.results}/{{dataset}}/{{split}}/fold{{fold}}/{file}"

    def fit(self, file: str) -> str:
        """Pattern of a file that depends on the fit."""
        return self.fold(f"{{method}}/seed{{seed}}/{file}")

    def result(self, file: str) -> str:
        """A file of the whole run."""
        return f"{self.config.results}/{file}"

    def fit_files(self, file: str, dataset: str | None = None, split: str | None = None) -> list[str]:
        """Files of all fits."""
        return [self.fit(file).format(**vars(job)) for job in self.jobs(dataset, split)]

    def history_files(self, dataset: str, split: str) -> list[str]:
        """Training histories of the methods that train."""
        jobs = [job for job in self.jobs(dataset, split) if self.methods[job.method].stochastic]
        return [self.fit("training.csv").format(**vars(job)) for job in jobs]

    def fold_files(self, file: str) -> list[str]:
        """Files of all folds."""
        keys = dict.fromkeys((job.dataset, job.split, job.fold) for job in self.jobs())
        return [self.fold(file).format(dataset=d, split=s, fold=f) for d, s, f in keys]

    def score_files(self) -> list[str]:
        """Every table of scores, those of the references included."""
        references = self.fold_files("references.parquet") if self.config.evaluation.references else []
        return [*self.fit_files("scores.parquet"), *references]

    def figure_files(self) -> list[str]:
        """Every figure, as svg; splits that only studies use have none but those of the studies."""
        run = [self.result(f"figures/{figure}.svg") for figure in RUN_FIGURES if self._jobs]
        pairs = dict.fromkeys((job.dataset, job.split) for job in self._benchmark)
        names = [(d, s, figure) for d, s in pairs for figure in self.split_figures(d, s)]
        of_splits = [self.result(f"figures/{d}/{s}/{figure}.svg") for d, s, figure in names]
        of_arms = [*self.gradients.figures(), *self.axes.figures()]
        return [*run, *of_splits, *self.studies.figures(self.config.studies), *of_arms]

    def products(self) -> list[str]:
        """What a run is for: report, tables and figures. All are asked for, so that a missing one is made again."""
        shown = [(Path(file), DRAWN if file.endswith(".svg") else (".html", ".csv")) for file in self.figure_files()]
        figures = [str(path.with_suffix(kind)) for path, kinds in shown for kind in kinds]
        return [self.result("report.html"), *self.table_folder(), self.result("config.yaml"), *figures]

    def table_folder(self) -> list[str]:
        """The tables of the benchmark, which a run of gradient cases alone does not have."""
        return [self.result("tables")] if self._jobs else []

    def split_figures(self, dataset: str, split: str) -> list[str]:
        """The figures of one dataset and split; curves only where something trains."""
        trains = bool(self.history_files(dataset, split))
        return [name for name in SPLIT_FIGURES if name != "training_curves" or trains]

    # --- slices of the configuration, as JSON ---------------------------------------------------------------------

    def card_slice(self, *keys: str) -> Any:
        """A function of wildcards that gives these sections of the dataset's card."""
        return lambda wildcards: as_json(self.cards[wildcards.dataset].model_dump(mode="json", include=set(keys)))

    def split_slice(self, wildcards: Any) -> str:
        """The split's own section; which methods run on it changes no split."""
        return as_json(self.config.splits[wildcards.split].model_dump(mode="json", exclude={"methods", "datasets"}))

    def feature_slice(self, wildcards: Any) -> str:
        """The features of a dataset: the run's section, and what differs."""
        return as_json(features_of(self.config, wildcards.dataset).model_dump(mode="json"))

    def method_slice(self, wildcards: Any) -> str:
        """What is saved with the model: title, implementation and parameters; resources change no fit."""
        spec = self.methods[wildcards.method]
        return as_json(spec.model_dump(mode="json", include={"title", "implementation", "params"}))

    def section(self, name: str, *without: str) -> str:
        """A top-level section, without the keys that the rule does not use."""
        return as_json(getattr(self.config, name).model_dump(mode="json", exclude=set(without)))

    def titles(self) -> str:
        """Method names as figures show them."""
        return as_json({name: spec.title for name, spec in self.methods.items()})

    def resolved(self, wildcards: Any = None) -> str:
        """The whole configuration with every default filled in."""
        return as_json(self.config.model_dump(mode="json"), sort=False)

    def capability_slice(self, wildcards: Any = None) -> str:
        """The part of the configuration that says which method can run on which data."""
        keys = {"dataset", "variants", "statistics", "cards", "method_files", "gene_set_cards"}
        return as_json({**self.config.model_dump(mode="json", include=keys), "methods": list(self._scored)})

    def program(self, wildcards: Any) -> str:
        """The command that fits and predicts: that of the method's own environment, where it has one."""
        environment = self.methods[wildcards.method].environment
        return quote(f".envs/{environment}/bin/perturbed" if environment else "perturbed")

    def environment_input(self, wildcards: Any) -> list[str]:
        """The stamp of the method's own environment."""
        environment = self.methods[wildcards.method].environment
        return [f".envs/{environment}/.ready"] if environment else []

    # --- inputs that depend on the wildcards ----------------------------------------------------------------------

    def reference_input(self, wildcards: Any) -> dict[str, str]:
        """What the references are scored from; simulated data have their noise-free truth too."""
        files = {"truth": self.data("prepared.h5ad"), "split": self.fold("split.csv")}
        files["features"] = self.fold("features.csv")
        if wildcards.dataset in self.simulated:
            files["noise_free"] = self.data("truth.h5ad")
        return {key: pattern.format(**dict(wildcards)) for key, pattern in files.items()}

    def noise_free_option(self, wildcards: Any, input: Any) -> str:
        """The option that hands over the simulator's truth, where there is one."""
        return f"--noise-free {input.noise_free}" if wildcards.dataset in self.simulated else ""

    def figure_details(self, figure: str) -> Callable[[Any], list[str]]:
        """A function of wildcards that gives the files a figure draws besides the tables."""

        def details(wildcards: Any) -> list[str]:
            dataset, split = wildcards.dataset, wildcards.split
            if figure == "training_curves":
                return self.history_files(dataset, split)
            if figure in ("hardest_easiest", "embedding"):
                return self.fit_files("details", dataset, split)
            return []

        return details

    def detail_options(self, wildcards: Any, input: Any) -> str:
        """The same files as options."""
        return " ".join(f"--details {path}" for path in input.details)

    def stem(self, wildcards: Any, output: Any) -> str:
        """The path without suffix of a figure, or of what else is shown."""
        return str(Path(output[0]).with_suffix(""))


def read_plan(config: dict[str, Any]) -> Plan:
    """A plan, with mistakes shown as one line and no traceback."""
    try:
        return Plan(config)
    except ConfigError as error:
        raise SystemExit(f"perturbed: {error}") from None


__all__ = ["RUN_FIGURES", "SPLIT_FIGURES", "Job", "Plan", "as_json", "read_plan"]
