"""What each axis case of a run needs and makes: cells, model, gene sets, tables, figures and the targets it answers.

Part of the plan (`perturbed.plan`): nothing here computes or reads data. A case belongs to no dataset of the benchmark:
its cells come from a Census card, its decoder from a model card, its pathways from gene-set cards.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from perturbed.axis.spec import PAPER_B_AXIS, AxisCase
from perturbed.config import check_plain
from perturbed.data.census.spec import CensusCard, FittedModel, ModelCard, SavedModel, load_census_card, load_model_card
from perturbed.errors import ConfigError, suggest
from perturbed.pathways.spec import GeneSetCard, load_gene_set_card

if TYPE_CHECKING:
    from perturbed.plan import Plan

AXIS_FIGURES = ("scores", "map", "umap", "pathways", "judge")
"""Kinds of figure that every case has; flows are one for each gene it names."""
TABLE = "table"
"""The pathways as a page, in place of a figure."""
PUBLISHED = "config/published/paper_b_pathways.csv"
"""The paper's pathways and verdicts."""
PLANTED = "planted"
"""In place of a gene-set card: the planted sets of simulated cells."""


class AxisPlan:
    """The axis cases of a plan.

    Parameters
    ----------
    plan
        The run they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        config = plan.config
        self.cases: dict[str, AxisCase] = config.axes
        cases = self.cases.values()
        self._check_spelling()
        self.cells: dict[str, CensusCard] = {
            name: load_census_card(name, config.census_cards)
            for name in dict.fromkeys(name for case in cases for name in (case.cells, case.model_cells or case.cells))
        }
        self.models: dict[str, ModelCard] = {
            name: load_model_card(name, config.model_cards) for name in dict.fromkeys(case.model for case in cases)
        }
        named = dict.fromkeys(name for case in cases for name in case.gene_sets if name != PLANTED)
        self.libraries: dict[str, GeneSetCard] = {
            name: load_gene_set_card(name, config.gene_set_cards) for name in named
        }

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_spelling(self) -> None:
        """Names become wildcards and folders, so they must be plain."""
        for name, case in self.cases.items():
            cards = (case.cells, case.model_cells or case.cells, case.model, *case.gene_sets)
            for used in (*cards, *(flow.label for flow in case.flows)):
                check_plain(f"axes.{name}", used)

    def check(self) -> None:
        """Refuse names that do not exist, and two answers to one question.

        Raises
        ------
        ConfigError
            One line that names the case and the key.
        """
        answered: dict[str, str] = {}
        for name, case in self.cases.items():
            where = f"config: axes.{name}"
            if PLANTED in case.gene_sets and case.cells not in self.simulated:
                raise ConfigError(f"{where}.gene_sets: {PLANTED!r} are those of simulated cells; {case.cells} are real")
            for item in self.items(name):
                if item not in PAPER_B_AXIS:
                    raise ConfigError(f"{where}: no such item {item!r}; {suggest(item, PAPER_B_AXIS)}")
                if item in case.answers and item not in _ANSWERED_BY:
                    raise ConfigError(f"{where}.answers: {item!r} is a flow; name it in the `answers` of a flow")
                if answered.setdefault(item, name) != name:
                    raise ConfigError(f"{where}: {item!r} is answered by {answered[item]!r} already")

    @cached_property
    def simulated(self) -> list[str]:
        """Census cards whose cells are simulated."""
        return [name for name, card in self.cells.items() if card.cells.kind == "simulation"]

    @property
    def fitted(self) -> list[str]:
        """Model cards that are fitted to a case's cells."""
        return [name for name, card in self.models.items() if isinstance(card.model, FittedModel)]

    @property
    def fetched(self) -> list[str]:
        """Model cards that name a file, published or on this machine."""
        return [name for name, card in self.models.items() if not isinstance(card.model, FittedModel)]

    # --- paths ----------------------------------------------------------------------------------------------------

    def census(self, file: str) -> str:
        """Pattern of a file that depends on the Census card alone."""
        return f"{self.plan.config.data}/census/{{census}}/{file}"

    def fitted_model(self) -> str:
        """Pattern of a model fitted to the cells of a Census card."""
        return self.census("models/{decoder}")

    def fetched_model(self) -> str:
        """Pattern of a model that was fetched or saved, checked."""
        return f"{self.plan.config.data}/models/{{decoder}}"

    def library(self, suffix: str = "gmt") -> str:
        """Pattern of a card's gene sets, spelt as the cells of a Census card spell them."""
        return self.census(f"gene_sets/{{library}}.{suffix}")

    def file(self, file: str) -> str:
        """Pattern of a file that depends on the case."""
        return self.plan.result(f"axes/{{axis}}/{file}")

    def figure(self, kind: str, suffix: str) -> str:
        """Pattern of a case's figure."""
        return self.plan.result(f"figures/axes/{{axis}}/{kind}.{suffix}")

    # --- inputs ---------------------------------------------------------------------------------------------------

    def cells_input(self, wildcards: Any) -> dict[str, str]:
        """What a query reads: the store of simulated cells, nothing where the release is published."""
        store = self.census("store").format(census=wildcards.census)
        return {"store": store} if wildcards.census in self.simulated else {}

    def store_option(self, wildcards: Any, input: Any) -> str:
        """The option that names a store of our own."""
        return f"--store {input.store}" if wildcards.census in self.simulated else ""

    def model_input(self, wildcards: Any) -> dict[str, str]:
        """The file of a saved model; where it is missing, the stage tells it better than Snakemake."""
        model = self.models[wildcards.decoder].model
        file = Path(model.folder) / "model.pt" if isinstance(model, SavedModel) else None
        return {"saved": str(file)} if file is not None and file.is_file() else {}

    def score_input(self, wildcards: Any) -> dict[str, str]:
        """Cells and model of a case, and the truth where the cells are simulated."""
        case = self.cases[wildcards.axis]
        found = {"cells": self.census("cells.h5ad").format(census=case.cells)}
        if case.model in self.fitted:
            found["model"] = self.fitted_model().format(census=case.model_cells or case.cells, decoder=case.model)
        else:
            found["model"] = self.fetched_model().format(decoder=case.model)
        if case.cells in self.simulated:
            found["truth"] = self.census("truth.csv").format(census=case.cells)
        if case.given is not None:
            found["given"] = case.given
        return found

    def score_options(self, wildcards: Any, input: Any) -> str:
        """The truth of simulated cells."""
        return f"--truth {input.truth}" if hasattr(input, "truth") else ""

    def libraries_of(self, name: str) -> dict[str, str]:
        """Gene sets of a case by library."""
        case = self.cases[name]
        return {
            library: self.census("gene_sets.gmt").format(census=case.cells)
            if library == PLANTED
            else self.library().format(census=case.cells, library=library)
            for library in case.gene_sets
        }

    def library_input(self, wildcards: Any) -> list[str]:
        """Gene-set files of a case."""
        return list(self.libraries_of(wildcards.axis).values())

    def library_options(self, wildcards: Any) -> str:
        """The same as options."""
        return " ".join(f"--gene-sets {name}={path}" for name, path in self.libraries_of(wildcards.axis).items())

    def planted_input(self, wildcards: Any) -> list[str]:
        """The truth of simulated cells, which names the planted sets."""
        case = self.cases[wildcards.axis]
        return [self.census("truth.csv").format(census=case.cells)] if PLANTED in case.gene_sets else []

    def planted_option(self, wildcards: Any, input: Any) -> str:
        """The same as an option, for telling hits from false alarms."""
        return f"--truth {input.truth}" if input.truth else ""

    def replay_input(self, wildcards: Any) -> list[str]:
        """The kept answers that a judge replays."""
        replay = self.cases[wildcards.axis].judge.replay
        return [] if replay is None else [replay]

    def drawn_from(self, kind: str) -> Any:
        """A function of wildcards that gives the folders a figure draws."""
        judged = ("enrichment", "judgement")
        folders = {"pathways": judged, TABLE: judged, "judge": ("judgement",)}.get(kind, ("tables",))
        return lambda wildcards: {folder: self.file(folder).format(axis=wildcards.axis) for folder in folders}

    def draw_options(self, kind: str) -> Any:
        """A function of wildcards that gives the same as options."""

        def options(wildcards: Any) -> str:
            folders = self.drawn_from(kind)(wildcards)
            named = [f"--{name} {path}" for name, path in folders.items()]
            if kind == "flow":
                named.append(f"--flow {quote(wildcards.flow)}")
            if kind in ("pathways", TABLE):
                case = self.cases[wildcards.axis]
                shown = "paper_b_table_pathways" in case.answers and case.cells not in self.simulated
                named += [f"--level {case.enrichment.fdr}", *([f"--published {PUBLISHED}"] if shown else [])]
            return " ".join(named)

        return options

    # --- slices ---------------------------------------------------------------------------------------------------

    def cells_slice(self, wildcards: Any) -> str:
        """The card's cells and what they must hold."""
        from perturbed.plan import as_json

        return as_json(self.cells[wildcards.census].model_dump(mode="json", include={"cells", "expect"}))

    def model_slice(self, wildcards: Any) -> str:
        """The card's model and what it must be."""
        from perturbed.plan import as_json

        return as_json(self.models[wildcards.decoder].model_dump(mode="json", include={"model", "expect"}))

    def library_slice(self, wildcards: Any) -> str:
        """The gene-set card, without what is only read by people."""
        from perturbed.plan import as_json

        return as_json(self.libraries[wildcards.library].model_dump(mode="json", exclude={"about"}))

    def slice(self, *without: str) -> Any:
        """A function of wildcards that gives the case without what the stage does not use."""
        from perturbed.plan import as_json

        unused = {"title", "note", "answers", "optional", "cells", "model", "model_cells", *without}

        def of_case(wildcards: Any) -> str:
            return as_json(self.cases[wildcards.axis].model_dump(mode="json", exclude=unused))

        return of_case

    def section(self, name: str) -> Any:
        """A function of wildcards that gives one section of the case."""
        from perturbed.plan import as_json

        return lambda wildcards: as_json(getattr(self.cases[wildcards.axis], name).model_dump(mode="json"))

    def top(self, wildcards: Any) -> int:
        """Length of the gene lists."""
        return self.cases[wildcards.axis].top

    # --- figures and targets --------------------------------------------------------------------------------------

    def kinds(self, name: str) -> list[str]:
        """Figures of one case; without gene sets there are no pathways."""
        case = self.cases[name]
        common = (*AXIS_FIGURES, TABLE) if case.gene_sets else AXIS_FIGURES[:3]
        return [*common, *(f"flow_{flow.label}" for flow in case.flows)]

    @property
    def flows(self) -> list[str]:
        """Names of the flows of all cases."""
        return list(dict.fromkeys(flow.label for case in self.cases.values() for flow in case.flows))

    def shown(self, name: str, kind: str) -> str:
        """What the report shows of a kind of figure: a picture, or a page."""
        return self.figure(kind, "html" if kind == TABLE else "svg").format(axis=name)

    def figures_of(self, name: str) -> list[str]:
        """Every figure of a case."""
        return [self.shown(name, kind) for kind in self.kinds(name)]

    def figures(self, *, optional: bool = False) -> list[str]:
        """Figures of every case; optional cases only where asked for."""
        names = [name for name, case in self.cases.items() if optional or not case.optional]
        return [figure for name in names for figure in self.figures_of(name)]

    def targets(self) -> list[str]:
        """Figures and tables of all cases, optional ones too."""
        return self.figures(optional=True)

    def items(self, name: str) -> list[str]:
        """Items of the paper that a case answers."""
        case = self.cases[name]
        return list(dict.fromkeys([*case.answers, *(item for flow in case.flows for item in flow.answers)]))

    @property
    def answers(self) -> dict[str, list[str]]:
        """Figures by item of the paper."""
        found: dict[str, list[str]] = {}
        for name, case in self.cases.items():
            for item in case.answers:
                found.setdefault(item, []).append(self.shown(name, _ANSWERED_BY[item]))
            for flow in case.flows:
                for item in flow.answers:
                    found.setdefault(item, []).append(self.shown(name, f"flow_{flow.label}"))
        return found

    def unanswered(self) -> list[str]:
        """Items of the paper that no case of this config answers."""
        return [item for item in PAPER_B_AXIS if item not in self.answers]

    def title(self, wildcards: Any) -> str:
        """A case's title."""
        return self.cases[wildcards.axis].title or wildcards.axis

    def labels(self, wildcards: Any) -> dict[str, str]:
        """What the report's list says of a figure."""
        return {"case": self.title(wildcards)}

    def spell_answers(self, wildcards: Any) -> str:
        """Items of the paper that the case answers, for readers."""
        items = self.items(wildcards.axis)
        return ", ".join(item.removeprefix("paper_b_").replace("_", " ") for item in items) or "none of the paper's"


_ANSWERED_BY = {
    "paper_b_islets": "map",
    "paper_b_census_umap": "umap",
    "paper_b_enrichment": "pathways",
    "paper_b_table_pathways": TABLE,
    "paper_b_judge": "judge",
}
"""Kind of figure that answers an item; the others are flows."""


__all__ = ["AXIS_FIGURES", "PLANTED", "AxisPlan"]
