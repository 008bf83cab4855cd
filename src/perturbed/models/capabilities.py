"""Which method runs on which data, and why the rest do not: from method files and cards, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from perturbed.data.cards import Card
from perturbed.models.spec import MethodSpec

COLUMNS = ("method", "title", "dataset", "runs", "reason", "environment")
_ABSENT = {
    "counts": "{dataset} has none (keys.counts is null)",
    "gene_names": "those of {dataset} are anonymous",
}


def list_lacks(method: MethodSpec, card: Card, dataset: str) -> list[str]:
    """What a method requires and neither the dataset nor a file of its own offers; empty where it runs."""

    def is_there(need: str) -> bool:
        own = method.own_file(need, dataset)
        return need in card.provides if own is None else Path(own).is_file()

    return [need for need in method.requires if not is_there(need)]


def explain_lack(need: str, method: MethodSpec, dataset: str) -> str:
    """One requirement that is not met, in words."""
    own = method.own_file(need, dataset)
    if own is not None:
        return f"needs {need.replace('_', ' ')}; {own} is not there"
    absent = _ABSENT.get(need, f"the card of {{dataset}} names none (files.{need})")
    return f"needs {need.replace('_', ' ')}; {absent.format(dataset=dataset)}"


def tabulate(methods: Mapping[str, MethodSpec], cards: Mapping[str, Card]) -> pd.DataFrame:
    """Every method with every dataset, in the order given.

    Parameters
    ----------
    methods
        Method files by the name the run uses.
    cards
        Cards by the name of the dataset.

    Returns
    -------
    DataFrame
        `method`, `title`, `dataset`, `runs`, `reason` (empty where it runs; else every unmet requirement) and
        `environment` (name of the method's own environment, empty for the common one).
    """
    rows = []
    for name, method in methods.items():
        for dataset, card in cards.items():
            lacks = list_lacks(method, card, dataset)
            reason = "; ".join(explain_lack(need, method, dataset) for need in lacks)
            rows.append((name, method.title, dataset, not lacks, reason, method.environment))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"runs": bool})
