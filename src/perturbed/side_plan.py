"""The side files of a run: whose they are, which rule makes them, and which methods go without.

Part of the plan (`perturbed.plan`): nothing here computes or reads data. Whether a method's own file is there is looked
up, since such files are optional.
"""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING, Any

from perturbed.data.cards import RemoteFile, names_card
from perturbed.models.capabilities import explain_lack, list_lacks
from perturbed.models.spec import ROLES
from perturbed.pathways.spec import GeneSetCard, load_gene_set_card

if TYPE_CHECKING:
    from perturbed.plan import Plan

GRAPH = "gene_graph.csv"
"""Where a card's graph of genes that is on the web goes, in the folder of the dataset."""


class SidePlan:
    """The side files of a plan.

    Parameters
    ----------
    plan
        The run they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        named = dict.fromkeys(card.files.gene_sets for card in plan.cards.values())
        self.libraries: dict[str, GeneSetCard] = {
            name: load_gene_set_card(name, plan.config.gene_set_cards) for name in named if name and names_card(name)
        }

    @property
    def graphs(self) -> list[str]:
        """Datasets whose graph of genes is on the web."""
        return [name for name, card in self.plan.cards.items() if isinstance(card.files.gene_graph, RemoteFile)]

    # --- what runs where ------------------------------------------------------------------------------------------

    def lacks(self, method: str, dataset: str) -> list[str]:
        """What the method requires and the dataset does not offer; empty where it runs."""
        return list_lacks(self.plan.methods[method], self.plan.cards[dataset], dataset)

    def explain(self, method: str, dataset: str) -> str:
        """Why the method is left out on the dataset; empty where it runs."""
        spec = self.plan.methods[method]
        return "; ".join(explain_lack(need, spec, dataset) for need in self.lacks(method, dataset))

    def left_out(self) -> list[str]:
        """One line for each method that cannot run on a dataset where it is wanted, with whom misses it, and why."""
        plan, wanted = self.plan, {}
        for dataset in plan.config.dataset:
            for split in plan.config.splits:
                for method in plan.methods_of(split) if plan.allows(dataset, split) else ():
                    wanted[method, dataset] = ["the benchmark"]
        for study in plan.config.studies:
            for pair in plan.studies.wanted(study):
                wanted.setdefault(pair, []).extend(plan.studies.spell_targets(study))
        return [
            f"{method} is left out on {dataset} ({', '.join(dict.fromkeys(who))}): {reason}"
            for (method, dataset), who in wanted.items()
            if (reason := self.explain(method, dataset))
        ]

    # --- paths ----------------------------------------------------------------------------------------------------

    def library(self, suffix: str = "gmt") -> str:
        """Pattern of the gene sets that a dataset's card names by their card."""
        return self.plan.data(f"gene_sets/{{library}}.{suffix}")

    def library_slice(self, wildcards: Any) -> str:
        """The card of gene sets."""
        from perturbed.plan import as_json

        return as_json(self.libraries[wildcards.library].model_dump(mode="json"))

    def graph_slice(self, wildcards: Any) -> str:
        """The graph of genes on the web."""
        from perturbed.plan import as_json

        graph = self.plan.cards[wildcards.dataset].files.gene_graph
        assert isinstance(graph, RemoteFile)
        return as_json(graph.model_dump(mode="json"))

    def path(self, role: str, dataset: str) -> str | None:
        """The dataset's file of a role, as the rules make it where the card does not give its path."""
        named = getattr(self.plan.cards[dataset].files, role)
        if isinstance(named, RemoteFile):
            return self.plan.data(GRAPH).format(dataset=dataset)
        if role == "gene_sets" and named is None and dataset in self.plan.simulated:
            return self.plan.data("gene_sets.gmt").format(dataset=dataset)
        if role == "gene_sets" and named in self.libraries:
            return self.library().format(dataset=dataset, library=named)
        return None if named is None else str(named)

    def files(self, wildcards: Any) -> dict[str, str]:
        """The side files that a method requires, by role: its own, or those of the dataset."""
        spec, dataset = self.plan.methods[wildcards.method], wildcards.dataset
        roles = [need for need in spec.requires if need in ROLES]
        found = {role: spec.own_file(role, dataset) or self.path(role, dataset) for role in roles}
        return {role: path for role, path in found.items() if path is not None}

    def input(self, wildcards: Any) -> list[str]:
        """Paths of the side files."""
        return list(self.files(wildcards).values())

    def options(self, wildcards: Any) -> str:
        """The same as options of `perturbed fit`."""
        return " ".join(f"--file {role}={quote(path)}" for role, path in self.files(wildcards).items())
