"""What a run gets from elsewhere.

Two kinds of things come from elsewhere: files on the web, which a card names by a `RemoteFile` wherever in it that
stands, and files that are made by asking a service (`Made`). `needs_of` is the one place that tells them: a new kind of
card needs nothing here as long as it names its files by `RemoteFile`, a new service is one case more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbed.config import Section
from perturbed.data.cards import PathSource, RemoteFile, SideFiles, names_card
from perturbed.data.census.spec import CensusCard, H5adCells, MinifiedCells, QueryCells, SavedModel
from perturbed.errors import ConfigError
from perturbed.files import sha256_text
from perturbed.pathways.spec import GeneSetCard, GeneSetPath, GeneSetUrl

if TYPE_CHECKING:
    from perturbed.plan import Plan


@dataclass(frozen=True)
class Made:
    """A file that no address serves: it is made on the connected machine, by asking a service."""

    name: str
    """Name in the mirror; holds the hash of the question, so that another question is another file."""
    make: Callable[[Path], None]
    """Writes it, whole or not at all."""
    origin: str = ""
    """Who was asked."""


@dataclass(frozen=True)
class Local:
    """A file or folder of this machine, which a card names by its path."""

    path: str


@dataclass(frozen=True)
class Vouched:
    """A file on the web whose content the card pins otherwise than by the hash of its bytes."""

    name: str


Need = RemoteFile | Made | Local | Vouched


@dataclass
class Needs:
    """What a run gets from elsewhere."""

    files: dict[str, list[RemoteFile]] = field(default_factory=dict)
    """Files on the web by name; an archive stands once for each member that is wanted of it."""
    made: dict[str, Made] = field(default_factory=dict)
    """Files made by asking, by name."""
    vouched: set[str] = field(default_factory=set)
    """Files on the web without a hash of their own, whose content the card pins in another way."""
    local: dict[str, str] = field(default_factory=dict)
    """Files of this machine that cards name, with the card; they are not collected."""
    users: dict[str, list[str]] = field(default_factory=dict)
    """Cards that need a file, by its name."""

    def add(self, user: str, found: Need) -> None:
        """Take in one thing that card `user` needs.

        Raises
        ------
        ConfigError
            If another card means another file by the same name.
        """
        if isinstance(found, Local):
            self.local.setdefault(found.path, user)
            return
        if isinstance(found, Vouched):
            self.vouched.add(found.name)
            return
        if isinstance(found, Made):
            self.made.setdefault(found.name, found)
        else:
            known = self.files.setdefault(found.name, [])
            if known and _identity(known[0]) != _identity(found):
                other = self.users[found.name][0]
                raise ConfigError(f"{user}: {found.name} is another file in {other}; give one of them another name")
            if found not in known:
                known.append(found)
        users = self.users.setdefault(found.name, [])
        if user not in users:
            users.append(user)


def _identity(file: RemoteFile) -> tuple[object, ...]:
    """What tells two files of one name: hashes and size, or the addresses where neither is known."""
    whole = (file.sha256, file.md5, file.bytes)
    return whole if any(whole) else file.urls


# --- what a run needs ---------------------------------------------------------------------------------------------


def cards_of(plan: Plan) -> dict[str, Section]:
    """Every card that a run uses, by what messages call it: a kind, a space and the card's name."""
    kinds: dict[str, Mapping[str, Section]] = {"dataset": plan.cards, "census": plan.axes.cells}
    kinds |= {"model": plan.axes.models, "gene-sets": {**plan.axes.libraries, **plan.side.libraries}}
    return {f"{kind} {name}": card for kind, cards in kinds.items() for name, card in cards.items()}


def find_needs(cards: Mapping[str, Section]) -> Needs:
    """What these cards get from elsewhere.

    Parameters
    ----------
    cards
        Cards of any kind, by what messages call them.

    Raises
    ------
    ConfigError
        If two cards mean different files by the same name.
    """
    needs = Needs()
    for user, card in cards.items():
        name = user.rpartition(" ")[2]
        for section in walk(card):
            for found in needs_of(section, name):
                needs.add(user, found)
    return needs


def needs_of(section: Section, name: str) -> Iterator[Need]:
    """What one section of card `name`, its inner ones aside, gets from elsewhere."""
    if isinstance(section, RemoteFile):
        yield section
    elif isinstance(section, PathSource | GeneSetPath):
        yield Local(section.path)
    elif isinstance(section, SideFiles):
        paths = [path for _, path in section if isinstance(path, str)]
        yield from (Local(path) for path in paths if path != section.gene_sets or not names_card(path))
    elif isinstance(section, MinifiedCells | H5adCells) and section.local is not None:
        yield Local(section.local)
    elif isinstance(section, SavedModel):
        yield Local(section.folder)
    elif isinstance(section, GeneSetCard) and isinstance(section.source, GeneSetUrl) and section.sorted_sha256:
        yield Vouched(section.source.file.name)
    elif isinstance(section, CensusCard) and isinstance(section.cells, QueryCells):
        yield Made(
            slice_name(section.cells, name), partial(_query, section, name), f"Census {section.cells.census_version}"
        )


def slice_name(cells: QueryCells, name: str) -> str:
    """Name of the cells of a query in a mirror; where its store lies is no part of the question.

    Parameters
    ----------
    cells
        The query.
    name
        Its card's name, which the cells' provenance holds.
    """
    return made_name(f"census-{name}", cells, "uri")


def _query(card: CensusCard, name: str, path: Path) -> None:
    from perturbed.data.census.query import query_cells

    query_cells(card, name, path)


def made_name(kind: str, section: Section, *without: str) -> str:
    """Name of the file that answers a question: the kind and the hash of what is asked.

    Parameters
    ----------
    kind
        First part of the name.
    section
        The question.
    without
        Keys that say where the answer comes from, and not what is asked.
    """
    asked = section.model_dump(mode="json", exclude=set(without))
    return f"{kind}-{sha256_text(json.dumps(asked, sort_keys=True))[:16]}.h5ad"


def walk(section: Section) -> Iterator[Section]:
    """A section and all sections in it, in the order of their keys."""
    yield section
    for _, value in section:
        yield from _walk_value(value)


def _walk_value(value: Any) -> Iterator[Section]:
    if isinstance(value, Section):
        yield from walk(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk_value(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk_value(item)
