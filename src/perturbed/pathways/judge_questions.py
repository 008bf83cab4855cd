"""What the judge is asked: the first pathways of each list, and random ones of like size beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbed.errors import DataError, suggest
from perturbed.files import sha256_text
from perturbed.pathways.gene_sets import read_gmt
from perturbed.pathways.judge_spec import JudgeSpec
from perturbed.pathways.spec import CONTROL

NEAREST = 10
"""A random pathway is one of so many candidates that are nearest in size to a listed one."""
_CHOICE = ["method", "background"]


@dataclass(frozen=True)
class Panel:
    """The pathways to judge.

    Parameters
    ----------
    memberships
        `library, list, group, pathway` of the listed ones, lists in the order of the enrichment.
    pathways
        `library, pathway, lists, is_random, set_size`: one row each, by name, random ones last.
    messages
        What is asked about each row of `pathways`.
    """

    memberships: pd.DataFrame
    pathways: pd.DataFrame
    messages: list[list[dict[str, str]]]


def read_panel(enrichment: str | Path, gene_sets: Mapping[str, Path], spec: JudgeSpec) -> Panel:
    """Listed pathways of an enrichment with random ones beside them.

    Candidates for the random ones were tested, and so could have been listed; they are in no list but that of random
    genes, which knows nothing and so bars nothing. They are drawn without replacement: for one listed pathway after the
    other, over and over, one of the `NEAREST` unused candidates by |log size ratio|. Where a library has fewer
    candidates than `spec.n_random`, all are taken.

    Parameters
    ----------
    enrichment
        Folder of `perturbed enrich`.
    gene_sets
        GMT files that it read, by library.
    spec
        Section `judge`.

    Raises
    ------
    DataError
        If a table lacks a column or rows, a library has no GMT or no candidate, or a pathway is not in its GMT.
    """
    folder = Path(enrichment)
    top = _choose(_read(folder / "top.csv", ["library", "list", "group", "pathway"]), spec, folder / "top.csv")
    tested = _choose(
        _read(folder / "enrichment.csv", ["library", "pathway", "set_size"]), spec, folder / "enrichment.csv"
    )
    tested["set_size"] = pd.to_numeric(tested["set_size"])
    memberships = top[["library", "list", "group", "pathway"]].drop_duplicates(ignore_index=True)
    tables: list[pd.DataFrame] = []
    genes: dict[str, dict[str, tuple[str, ...]]] = {}
    for library in sorted(set(memberships["library"])):
        listed = memberships[memberships["library"] == library]
        genes[library] = _read_genes(library, gene_sets)
        sizes = tested[tested["library"] == library].groupby("pathway", sort=True)["set_size"].median()
        _check_names(sizes.index, listed["pathway"], genes[library], library, gene_sets[library], folder)
        tables.append(_one_library(library, listed, sizes, spec))
    pathways = pd.concat(tables, ignore_index=True)
    messages = [
        ask(pathway, spec, genes[library][pathway])
        for library, pathway in zip(pathways["library"].astype(str), pathways["pathway"].astype(str))
    ]
    return Panel(memberships, pathways, messages)


def ask(pathway: str, spec: JudgeSpec, genes: Sequence[str] = ()) -> list[dict[str, str]]:
    """Messages that ask about one pathway: its name, and its genes only where `spec.show_genes`."""
    filled = {"subject": spec.subject, "pathway": show_name(pathway)}
    text = re.sub(r"\{(subject|pathway)\}", lambda found: filled[found.group(1)], spec.prompt)
    if spec.show_genes:
        text += f"\n\nGenes of the pathway: {', '.join(sorted(genes))}"
    return [{"role": "user", "content": text}]


def show_name(pathway: str) -> str:
    """A set's name as a reader would write it: without what follows `%`, words apart."""
    name = pathway.split("%")[0].strip() or pathway
    return name if " " in name else name.replace("_", " ")


def draw_matched(listed: np.ndarray, candidates: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `n` candidates (or all there are) whose sizes are spread as those of the listed.

    Parameters
    ----------
    listed
        Sizes (n_listed,).
    candidates
        Sizes (n_candidates,).
    n
        How many to draw.
    rng
        Of the draw.
    """
    left = np.arange(len(candidates))
    log_size, targets = np.log(candidates), np.log(listed)
    drawn: list[int] = []
    while len(drawn) < min(n, len(candidates)):
        for target in rng.permutation(targets)[: n - len(drawn)]:
            if not len(left):
                break
            shuffled = rng.permutation(left)  # so that ties in size go to anybody
            near = shuffled[np.argsort(np.abs(log_size[shuffled] - target), kind="stable")[:NEAREST]]
            picked = int(rng.choice(near))
            drawn.append(picked)
            left = left[left != picked]
    return np.array(sorted(drawn), dtype=int)


def _one_library(library: str, listed: pd.DataFrame, sizes: pd.Series, spec: JudgeSpec) -> pd.DataFrame:
    names = listed.assign(label=[_label(row) for row in listed.to_dict("records")])
    lists = names.groupby("pathway", sort=True)["label"].agg(";".join)
    barring = sorted(set(listed.loc[listed["list"] != CONTROL, "pathway"])) or list(lists.index)
    shown = {show_name(pathway) for pathway in barring}
    candidates = sizes[[show_name(pathway) not in shown for pathway in sizes.index]]
    if candidates.empty:
        raise DataError(f"library {library}: every tested pathway is in a list, so there is none to compare with")
    rng = np.random.default_rng([spec.seed, int(sha256_text(library)[:8], 16)])
    drawn = draw_matched(sizes[barring].to_numpy(float), candidates.to_numpy(float), spec.n_random, rng)
    random = candidates.index[drawn]
    names_of = sorted(set(lists.index) - set(random)) + list(random)
    found = pd.DataFrame({"pathway": names_of, "lists": [lists.get(name, "") for name in names_of]})
    found["is_random"] = found["pathway"].isin(random)
    found["set_size"] = sizes[found["pathway"]].to_numpy()
    return found.assign(library=library)[["library", "pathway", "lists", "is_random", "set_size"]]


def _label(row: dict) -> str:
    return f"{row['list']} ({row['group']})" if row["group"] else str(row["list"])


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path}: no such file; make the folder with `perturbed enrich`")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(f"{path}: column {missing[0]!r} is missing; make the folder with `perturbed enrich`")
    return table


def _choose(table: pd.DataFrame, spec: JudgeSpec, path: Path) -> pd.DataFrame:
    """Rows of the test and background to judge; a table that has no such columns is of one alone."""
    for column in _CHOICE:
        wanted = getattr(spec, column)
        if column in table:
            found = table[table[column] == wanted]
            if found.empty:
                raise DataError(f"{path}: no row has {column} {wanted!r}; {suggest(wanted, set(table[column]))}")
            table = found
    if table.empty:
        raise DataError(f"{path}: no rows, so there is nothing to judge")
    return table.reset_index(drop=True)


def _read_genes(library: str, gene_sets: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    if library not in gene_sets:
        raise DataError(f"judge: no gene sets for library {library!r}; give --gene-sets {library}=PATH")
    return {one.name: one.genes for one in read_gmt(Path(gene_sets[library]))}


def _check_names(
    tested: pd.Index, listed: pd.Series, known: Mapping[str, object], library: str, path: Path, folder: Path
) -> None:
    foreign = [name for name in tested if name not in known]
    if foreign:
        raise DataError(f"{path}: has no pathway {foreign[0]!r}, which {folder} tested; give the GMT that it read")
    untested = sorted(set(listed) - set(tested))
    if untested:
        raise DataError(f"{folder}: {untested[0]!r} of library {library} is in top.csv, but not in enrichment.csv")
