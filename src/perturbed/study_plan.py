"""What each study of a run needs and makes: its fits, its files, and the targets it answers.

Part of the plan (`perturbed.plan`): nothing here computes or reads data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from perturbed.errors import ConfigError, suggest
from perturbed.study_config import (
    PAPER_A,
    SCORED,
    Comparison,
    Denoising,
    Identifiability,
    LatentMap,
    Probe,
    Programs,
    Study,
    Sweep,
)

if TYPE_CHECKING:
    from perturbed.plan import Plan

FLOORS = ("mean_effect", "no_change")
"""Methods scored with every comparison of a run that has them, because they are the floors."""


@dataclass(frozen=True)
class Job:
    """One cell of the grid."""

    dataset: str
    split: str
    fold: int
    method: str
    seed: int


def methods_of(study: Study) -> tuple[str, ...]:
    """Every method that a study names, in its order."""
    if isinstance(study, Sweep):
        return (*study.levels, *study.baselines)
    if isinstance(study, Denoising):
        return (study.baseline, *study.methods)
    if isinstance(study, Programs):
        return (study.method,)
    return () if isinstance(study, Identifiability) else tuple(study.methods)


def splits_of(study: Study) -> tuple[str, ...]:
    """Every split that a study names."""
    if isinstance(study, Denoising):
        return tuple(study.levels)
    if isinstance(study, Probe | Programs | LatentMap):
        return (study.split,)
    return () if isinstance(study, Identifiability) else tuple(study.splits)


class StudyPlan:
    """The studies of a plan.

    Parameters
    ----------
    plan
        The run they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.studies = plan.config.studies

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that a study names."""
        return tuple(dict.fromkeys(name for study in self.studies.values() for name in methods_of(study)))

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the studies of these kinds."""
        return [name for name, study in self.studies.items() if study.kind in kinds]

    def constraint(self, *kinds: str) -> str:
        """Regular expression of the wildcard `study` for these kinds; matches nothing where there is none."""
        return "|".join(self.of_kind(*kinds)) or "(?!)"

    # --- checks ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse names that do not exist.

        Raises
        ------
        ConfigError
            One line that names the study and the key.
        """
        for name, study in self.studies.items():
            where = f"config: studies.{name}"
            self._check_names(f"{where}.{_METHODS_KEY.get(study.kind, 'methods')}", methods_of(study), "method")
            key = "levels" if isinstance(study, Denoising) else "splits"
            self._check_names(f"{where}.{key}", splits_of(study), "split")
            self._check_names(f"{where}.datasets", _datasets_of(study) or (), "dataset")
            self._check_names(f"{where}.metrics", _metrics_of(study), "metric")
            for item in study.answers:
                self._check_item(f"{where}.answers", item)
            if isinstance(study, Sweep) and study.probe is not None:
                probes = self.of_kind("probe")
                if study.probe not in probes:
                    raise ConfigError(f"{where}.probe: no probe study {study.probe!r}; {suggest(study.probe, probes)}")
            if not isinstance(study, Identifiability) and not self.jobs(name):
                raise ConfigError(
                    f"{where}: no dataset, split and method of it go together; see `requires` and `datasets`"
                )

    def _check_names(self, key: str, names: Iterable[str], kind: str) -> None:
        from perturbed.evaluation.registry import METRICS

        config = self.plan.config
        lists: dict[str, Iterable[str]] = {
            "method": self.plan.methods,
            "split": config.splits,
            "dataset": config.dataset,
            "metric": METRICS,
        }
        known = lists[kind]
        for name in names:
            if name not in known:
                raise ConfigError(f"{key}: no {kind} {name!r}; {suggest(name, known)}")

    def _check_item(self, key: str, item: str) -> None:
        if item.startswith("paper_a_") and item not in PAPER_A:
            raise ConfigError(f"{key}: no such item {item!r}; {suggest(item, PAPER_A)}")
        if not re.fullmatch(r"paper_[a-z][a-z0-9_]*", item):
            raise ConfigError(f"{key}: {item!r} is no usable target; use paper_ and letters, digits and _")

    # --- the grid -------------------------------------------------------------------------------------------------

    def jobs(self, name: str) -> list[Job]:
        """The fits of one study; those a method cannot run on are left out."""
        study = self.studies[name]
        found = [job for page in self.pages(name) for job in self.plan.cell(*page, methods_of(study))]
        if isinstance(study, Programs | Probe | LatentMap):
            found = [job for job in found if job.fold == 0]
        return found

    def pages(self, name: str) -> list[tuple[str, str]]:
        """Datasets and splits of one study."""
        datasets = _datasets_of(self.studies[name]) or self.plan.config.dataset
        pairs = [(dataset, split) for dataset in datasets for split in splits_of(self.studies[name])]
        return [pair for pair in pairs if self.plan.allows(*pair)]

    def wanted(self, name: str) -> list[tuple[str, str]]:
        """Methods with the datasets on which the study wants them, whether they run there or not."""
        datasets = dict.fromkeys(dataset for dataset, _ in self.pages(name))
        return [(method, dataset) for dataset in datasets for method in methods_of(self.studies[name])]

    def _floor_jobs(self, name: str) -> Iterator[Job]:
        floors = [method for method in FLOORS if method in self.plan.methods]
        for dataset, split in dict.fromkeys((job.dataset, job.split) for job in self.jobs(name)):
            wanted = self.plan.config.splits[split].methods
            yield from self.plan.cell(
                dataset, split, [method for method in floors if wanted is None or method in wanted]
            )

    # --- paths ----------------------------------------------------------------------------------------------------

    def file(self, file: str) -> str:
        """Pattern of a file that depends on the study."""
        return self.plan.result(f"studies/{{study}}/{file}")

    def figure(self, suffix: str) -> str:
        """Pattern of a study's figure."""
        return self.plan.result(f"figures/studies/{{study}}.{suffix}")

    def figures(self, names: Iterable[str]) -> list[str]:
        """Figures of these studies, as svg."""
        return [self.figure("svg").format(study=name) for name in names]

    def score_files(self, wildcards: Any) -> list[str]:
        """Scores of the study's fits, of the floors and of the references."""
        jobs = dict.fromkeys([*self.jobs(wildcards.study), *self._floor_jobs(wildcards.study)])
        files = [self.plan.fit("scores.parquet").format(**vars(job)) for job in jobs]
        folds = dict.fromkeys((job.dataset, job.split, job.fold) for job in jobs)
        if self.plan.config.evaluation.references:
            pattern = self.plan.fold("references.parquet")
            files += [pattern.format(dataset=d, split=s, fold=f) for d, s, f in folds]
        return files

    def history_files(self, wildcards: Any) -> list[str]:
        """Training histories behind a sweep that shows terms of them."""
        study = self.studies[wildcards.study]
        if not isinstance(study, Sweep) or not study.history:
            return []
        jobs = [job for job in self.jobs(wildcards.study) if job.method in study.levels]
        return [self.plan.fit("training.csv").format(**vars(job)) for job in jobs]

    def detail_folders(self, wildcards: Any) -> list[str]:
        """Effects per gene and the features behind a comparison on the most expressed genes, in pairs."""
        study = self.studies[wildcards.study]
        if not isinstance(study, Comparison) or study.top_expressed is None:
            return []
        patterns = (self.plan.fit("details"), self.plan.fold("features.csv"))
        return [pattern.format(**vars(job)) for job in self.jobs(wildcards.study) for pattern in patterns]

    def probe_file(self, wildcards: Any) -> list[str]:
        """The table of the probe study behind a sweep."""
        probe = getattr(self.studies[wildcards.study], "probe", None)
        return [] if probe is None else [self.file("table.csv").format(study=probe)]

    def published_file(self, wildcards: Any) -> list[str]:
        """The published numbers that a study prints beside its own."""
        published = getattr(self.studies[wildcards.study], "published", None)
        return [] if published is None else [published]

    def model_input(self, wildcards: Any) -> dict[str, Any]:
        """What a study of fitted models reads: cells, split, features, and the models of one or all seeds."""
        jobs = self.jobs(wildcards.study)
        if self.studies[wildcards.study].kind == "latent_map":
            jobs = [job for job in jobs if job.seed == self.plan.seeds(job.method)[0]]
        first = jobs[0]
        files: dict[str, Any] = {"prepared": self.plan.data("prepared.h5ad"), "split": self.plan.fold("split.csv")}
        files["features"] = self.plan.fold("features.csv")
        found = {
            key: pattern.format(dataset=first.dataset, split=first.split, fold=0) for key, pattern in files.items()
        }
        # a method that looks cells up reads its side file again
        files = dict.fromkeys(path for job in jobs for path in self.plan.side.input(job))
        models = [self.plan.fit("model").format(**vars(job)) for job in jobs]
        return {**found, "files": list(files), "models": models}

    def truth_input(self, wildcards: Any) -> dict[str, Any]:
        """The same for programs, with gene sets and planted truth where the dataset has them."""
        dataset = self.jobs(wildcards.study)[0].dataset
        files = self.model_input(wildcards)
        if dataset in self.plan.simulated:
            files["truth"] = self.plan.data("truth.h5ad").format(dataset=dataset)
        gene_sets = self.plan.side.path("gene_sets", dataset)
        return files if gene_sets is None else {**files, "gene_sets": gene_sets}

    def named_models(self, wildcards: Any, input: Any) -> str:
        """Models as options, each as METHOD@SEED=PATH; the path ends in METHOD/seedSEED/model."""
        named = [(*Path(path).parts[-3:-1], path) for path in input.models]
        return " ".join(f"--model {method}@{seed.removeprefix('seed')}={path}" for method, seed, path in named)

    def options(self, flag: str, key: str) -> Any:
        """A function that gives every path of an input as an option of a verb."""

        def spell(wildcards: Any, input: Any) -> str:
            paths = input.get(key, [])
            return " ".join(f"{flag} {quote(path)}" for path in ([paths] if isinstance(paths, str) else paths))

        return spell

    # --- identifiability ------------------------------------------------------------------------------------------

    def settings(self, name: str) -> dict[str, Any]:
        """Settings of an identifiability study, by name."""
        from perturbed.interpret.identifiability_spec import expand

        study = self.studies[name]
        assert isinstance(study, Identifiability)
        return expand(study.options)

    def seeds(self, name: str) -> tuple[int, ...]:
        """Seeds of a study: its own, or those of the run."""
        seeds = getattr(self.studies[name], "seeds", None)
        return self.plan.config.seeds if seeds is None else seeds

    def parts(self, wildcards: Any) -> list[str]:
        """The tables that are joined to the study's one."""
        name = wildcards.study
        pattern = self.file("{setting}/seed{seed}.csv")
        return [
            pattern.format(study=name, setting=setting, seed=seed)
            for setting in self.settings(name)
            for seed in self.seeds(name)
        ]

    def setting_slice(self, wildcards: Any) -> str:
        """One setting, as JSON."""
        from perturbed.plan import as_json

        return as_json(self.settings(wildcards.study)[wildcards.setting].model_dump(mode="json"))

    # --- slices, captions and targets -----------------------------------------------------------------------------

    def slice(self, wildcards: Any) -> str:
        """The study's own section; what it answers and its title change the figure, not the table."""
        from perturbed.plan import as_json

        study = self.studies[wildcards.study]
        without = {"title"} if getattr(study, "published", None) is not None else {"title", "answers"}
        return as_json(study.model_dump(mode="json", exclude=without), sort=False)

    def drawing_slice(self, wildcards: Any) -> str:
        """The whole section, which the figure needs for titles and order."""
        from perturbed.plan import as_json

        return as_json(self.studies[wildcards.study].model_dump(mode="json"), sort=False)

    def labels(self, wildcards: Any) -> dict[str, str]:
        """What the report's list says of a figure: its title and the items of the paper it answers."""
        return {"study": self.studies[wildcards.study].title, "answers": self.spell_answers(wildcards)}

    def spell_answers(self, wildcards: Any) -> str:
        """Items of the paper that the study answers, for readers."""
        return ", ".join(map(spell_item, self.studies[wildcards.study].answers)) or "none of the paper's"

    def spell_targets(self, name: str) -> list[str]:
        """Targets that a study belongs to; its own name where it answers nothing."""
        return list(self.studies[name].answers) or [f"study {name}"]

    def spell_left_out(self, wildcards: Any) -> str:
        """Methods that the study wants and that cannot run, with the reasons, for readers; empty where all run."""
        reasons = ((*pair, self.plan.side.explain(*pair)) for pair in self.wanted(wildcards.study))
        titles = self.plan.methods
        return "; ".join(f"{titles[m].title} on {dataset} ({reason})" for m, dataset, reason in reasons if reason)

    @property
    def answers(self) -> dict[str, list[str]]:
        """Studies by target, one or several: the items of the papers, and the kinds that are targets themselves."""
        targets: dict[str, list[str]] = {}
        for name, study in self.studies.items():
            for item in dict.fromkeys(study.answers):
                targets.setdefault(item, []).append(name)
        if self.of_kind("identifiability"):
            targets["identifiability"] = self.of_kind("identifiability")
        return targets

    def unanswered(self) -> list[str]:
        """Items of the paper that no study of this config answers."""
        return [item for item in (*PAPER_A, "identifiability") if item not in self.answers]


def spell_item(item: str) -> str:
    """`paper_a_table4` as a reader writes it: Table 4."""
    name = item.removeprefix("paper_a_").removeprefix("paper_b_")
    found = re.fullmatch(r"(fig|table)(\d+)", name)
    if found:
        return f"{'Figure' if found[1] == 'fig' else 'Table'} {found[2]}"
    return "Appendix I" if name == "appendix_i" else name.replace("_", " ")


_METHODS_KEY = {"sweep": "levels", "programs": "method"}


def _datasets_of(study: Study) -> tuple[str, ...] | None:
    if isinstance(study, Probe | Programs | LatentMap):
        return (study.dataset,)
    return getattr(study, "datasets", None)


def _metrics_of(study: Study) -> tuple[str, ...]:
    if study.kind == "conditions":
        return (study.x, study.y)
    return getattr(study, "metrics", ())


__all__ = ["SCORED", "StudyPlan", "methods_of", "spell_item", "splits_of"]
