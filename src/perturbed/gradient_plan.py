"""What each gradient case of a run needs and makes: its fits, its files, and the targets it answers.

Part of the plan (`perturbed.plan`): nothing here computes or reads data. The fits are of cases alone: they are neither
predicted from nor scored, so they are no jobs of the benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from perturbed.errors import ConfigError, suggest
from perturbed.gradients.spec import PAPER_B, GradientCase

if TYPE_CHECKING:
    from perturbed.models.spec import MethodSpec
    from perturbed.plan import Plan

ALL = "all"
"""Stands for the judged group where one model answers for all."""
CASE_FIGURES = ("flow", "umap", "screen")
"""Kinds of figure that one case has; `quality` is one for all cases."""


def slug(name: str) -> str:
    """A group's name as part of a path: `CD14 Mono` is `cd14_mono`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class GradientPlan:
    """The gradient cases of a plan.

    Parameters
    ----------
    plan
        The run they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        config = plan.config
        self.cases = {name: case for name, case in config.gradients.items() if case.dataset in config.dataset}
        self.left_out = [
            f"gradient case {name} is left out, because {case.dataset} is not in this run"
            for name, case in config.gradients.items()
            if name not in self.cases
        ]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that a case names."""
        return tuple(dict.fromkeys(case.method for case in self.cases.values()))

    def masked_methods(self, methods: dict[str, MethodSpec]) -> dict[str, MethodSpec]:
        """The variants with one group's labels masked, by name.

        Raises
        ------
        ConfigError
            If the method has no heads whose labels could be masked, or two groups would share a folder.
        """
        found: dict[str, MethodSpec] = {}
        for name, case in self.cases.items():
            if not case.masked_groups:
                continue
            slugs = [slug(group) for group in case.judged]
            if len(set(slugs)) < len(slugs) or "" in slugs:
                raise ConfigError(f"config: gradients.{name}.judged: two groups have the same letters and digits")
            base = methods[case.method]
            heads = base.params.get("heads") or {}
            if not heads:
                raise ConfigError(f"config: gradients.{name}: masked_groups, but {case.method} has no `heads` to mask")
            for group in case.judged:
                masked = {key: _mask(head, str(case.groups), group) for key, head in heads.items()}
                spec = base.model_copy(update={"params": {**base.params, "heads": masked}})
                if found.setdefault(masked_name(case, group), spec) != spec:
                    raise ConfigError(
                        f"config: gradients.{name}.groups: {group!r} of another column is masked in {case.method} "
                        "already; use a variant of another name"
                    )
        return found

    # --- checks ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse names that do not exist, and two answers to one question.

        Raises
        ------
        ConfigError
            One line that names the case and the key.
        """
        config = self.plan.config
        cards = {path.stem for folder in config.cards for path in Path(folder).glob("*.yaml")}
        answered: dict[str, str] = {}
        for name, case in config.gradients.items():
            if case.dataset not in cards:
                raise ConfigError(
                    f"config: gradients.{name}.dataset: no card {case.dataset!r}; {suggest(case.dataset, cards)}"
                )
        for name, case in self.cases.items():
            where = f"config: gradients.{name}"
            if case.split not in config.splits:
                raise ConfigError(f"{where}.split: no split {case.split!r}; {suggest(case.split, config.splits)}")
            if not self.plan.allows(case.dataset, case.split):
                raise ConfigError(f"{where}.split: {case.split!r} is not meant for {case.dataset}; see its `datasets`")
            lacking = self.plan.side.lacks(case.method, case.dataset)
            if lacking:
                raise ConfigError(f"{where}.method: {case.method} needs {lacking[0]}, which {case.dataset} lacks")
            for item in case.answers:
                if item not in PAPER_B:
                    raise ConfigError(f"{where}.answers: no such item {item!r}; {suggest(item, PAPER_B)}")
                if item.endswith("_umap") and not case.umap:
                    raise ConfigError(f"{where}.answers: {item} is a UMAP; set `umap: true`")
                if item != QUALITY and answered.setdefault(item, name) != name:
                    raise ConfigError(f"{where}.answers: {item!r} is answered by {answered[item]!r} already")

    # --- the grid -------------------------------------------------------------------------------------------------

    def seeds(self, name: str) -> tuple[int, ...]:
        """Training seeds of a case."""
        case = self.cases[name]
        return self.plan.seeds(case.method)[: case.seeds]

    def judged(self, name: str) -> dict[str, str]:
        """Parts of a case, each with a model of its own: folder to group."""
        case = self.cases[name]
        return {slug(group): group for group in case.judged} if case.masked_groups else {ALL: ALL}

    def method(self, name: str, part: str) -> str:
        """The method whose model answers for a part of a case."""
        case = self.cases[name]
        return masked_name(case, self.judged(name)[part]) if case.masked_groups else case.method

    @property
    def parts(self) -> list[str]:
        """Every part of every case."""
        return list(dict.fromkeys(part for name in self.cases for part in self.judged(name)))

    # --- paths ----------------------------------------------------------------------------------------------------

    def file(self, file: str) -> str:
        """Pattern of a file that depends on the case."""
        return self.plan.result(f"gradients/{{case}}/{file}")

    def figure(self, kind: str, suffix: str) -> str:
        """Pattern of a case's figure."""
        return self.plan.result(f"figures/gradients/{{case}}/{kind}.{suffix}")

    def quality_figure(self, suffix: str) -> str:
        """The one figure of all cases."""
        return self.plan.result(f"figures/gradients/quality.{suffix}")

    def kinds(self, name: str) -> list[str]:
        """Figures of one case."""
        case = self.cases[name]
        if case.screen:
            return ["screen"]
        return ["flow", *(["umap"] if case.umap else [])]

    def of_kind(self, kind: str) -> str:
        """Regular expression of the cases that have a figure of this kind; matches nothing where there is none."""
        return "|".join(name for name in self.cases if kind in self.kinds(name)) or "(?!)"

    def figures(self) -> list[str]:
        """Every figure of every case, as svg."""
        found = [self.figure(kind, "svg").format(case=name) for name in self.cases for kind in self.kinds(name)]
        return [*found, self.quality_figure("svg")] if found else []

    def flow_input(self, wildcards: Any) -> dict[str, str]:
        """What one part of a case reads: the model and its cells."""
        case = self.cases[wildcards.case]
        place = {"dataset": case.dataset, "split": case.split, "fold": 0, "seed": wildcards.seed}
        place["method"] = self.method(wildcards.case, wildcards.part)
        patterns = {"model": self.plan.fit("model"), "prepared": self.plan.data("prepared.h5ad")}
        patterns |= {"split": self.plan.fold("split.csv"), "features": self.plan.fold("features.csv")}
        if case.screen and case.dataset in self.plan.simulated:
            patterns["truth"] = self.plan.data("truth.h5ad")
        return {key: pattern.format(**place) for key, pattern in patterns.items()}

    def flows(self, wildcards: Any) -> list[str]:
        """Folders of all parts and seeds of a case."""
        name = wildcards.case
        pattern = self.file("{part}/seed{seed}")
        return [
            pattern.format(case=name, part=part, seed=seed) for part in self.judged(name) for seed in self.seeds(name)
        ]

    def tables(self, wildcards: Any = None) -> list[str]:
        """Gathered tables of all cases."""
        return [self.file("tables").format(case=name) for name in self.cases]

    # --- slices, captions and targets -----------------------------------------------------------------------------

    def slice(self, wildcards: Any) -> str:
        """The case's own section, without what changes figures only or is in the input already."""
        from perturbed.plan import as_json

        unused = {"title", "answers", "dataset", "split", "method", "seeds"}
        return as_json(self.cases[wildcards.case].model_dump(mode="json", exclude=unused))

    def options(self, wildcards: Any, input: Any) -> str:
        """Which group the model answers for, and the simulator's truth where there is one."""
        group = self.judged(wildcards.case)[wildcards.part]
        judged = "" if group == ALL else f"--judged {quote(group)}"
        return f"{judged} --truth {input.truth}" if hasattr(input, "truth") else judged

    def title(self, wildcards: Any) -> str:
        """A case's title."""
        return self.cases[wildcards.case].title or wildcards.case

    def titles(self) -> str:
        """Titles of all cases, as JSON."""
        from perturbed.plan import as_json

        return as_json({name: case.title or name for name, case in self.cases.items()})

    def labels(self, wildcards: Any) -> dict[str, str]:
        """What the report's list says of a figure."""
        return {"case": self.title(wildcards)}

    def spell_answers(self, wildcards: Any) -> str:
        """Items of the paper that the case answers, for readers."""
        items = self.cases[wildcards.case].answers
        return ", ".join(item.removeprefix("paper_b_").replace("_", " ") for item in items) or "none of the paper's"

    @property
    def answers(self) -> dict[str, str]:
        """Figure by item of the paper."""
        found = {}
        for name, case in self.cases.items():
            for item in case.answers:
                kind = "umap" if item.endswith("_umap") else self.kinds(name)[0]
                figure = self.figure(kind, "svg").format(case=name)
                found[item] = self.quality_figure("svg") if item == QUALITY else figure
        return found

    def unanswered(self) -> list[str]:
        """Items of the paper that no case of this config answers."""
        return [item for item in PAPER_B if item not in self.answers]


QUALITY = "paper_b_quality"


def masked_name(case: GradientCase, group: str) -> str:
    """Name of the variant whose heads saw no label of a group."""
    return f"{case.method}-masks-{slug(group)}"


def _mask(head: dict[str, Any], column: str, group: str) -> dict[str, Any]:
    mask = dict(head.get("mask") or {})
    mask[column] = sorted({*_as_list(mask.get(column, ())), group})
    return {**head, "mask": mask}


def _as_list(value: Iterable[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


__all__ = ["CASE_FIGURES", "GradientPlan", "masked_name", "slug"]
