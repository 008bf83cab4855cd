"""Libraries of gene sets: fetched or found, read strictly, translated to the data's symbols, written as sorted GMT."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from perturbed.data.fetch import fetch_file
from perturbed.errors import ConfigError, DataError
from perturbed.files import atomic, sha256_text
from perturbed.pathways.identifiers import Fate, read_gene_table, read_id_table, resolve
from perturbed.pathways.spec import GeneSetCard, GeneSetSource, GeneSetUrl, IdTable

MAPPING = (
    "level",
    "pathway",
    "n_in",
    "n_repeated",
    "n_mapped",
    "n_lost",
    "n_ambiguous",
    "n_merged",
    "n_out",
    "n_in_data",
    "lost",
)
"""Columns of the mapping report. `n_in` distinct ids = `n_mapped` + `n_lost`; `n_merged` symbols were reached twice, so
that `n_out` distinct ones are left; `n_in_data` of those are genes of the data (empty where none were given)."""
_SHOWN = 5


@dataclass(frozen=True)
class GeneSet:
    """One set: its name, what the file says of it, its distinct genes, and how many it named again."""

    name: str
    description: str
    genes: tuple[str, ...]
    n_repeated: int = 0


@dataclass(frozen=True)
class Access:
    """Where files come from: the folder of downloads' parent, a mirror, and whether unpinned files are accepted."""

    data_dir: Path = Path("data")
    mirror: Path | None = None
    allow_unpinned: bool = False


def write_gene_sets(card: GeneSetCard, name: str, out: Path, *, access: Access, var_table: Path | None = None) -> str:
    """Write a library as GMT with symbols of the data's organism, and `STEM.mapping.csv` with what was lost.

    Parameters
    ----------
    card
        The library's card.
    name
        Its name, for messages.
    out
        The GMT to write: name, description, symbols; sets and symbols sorted.
    access
        Where downloads are kept and looked for.
    var_table
        csv of the data's genes: `symbol` and, for Ensembl ids, `gene`.

    Returns
    -------
    str
        Hash of the library's normal form, as `sorted_sha256` pins it.

    Raises
    ------
    PerturbedError
        If a file cannot be had, is not the pinned one, is no GMT, or no gene of it can be mapped.
    """
    path = find_library(card.source, name, access, pinned=card.sorted_sha256 is not None)
    sets = read_gmt(path)
    digest = hash_sets(sets)
    if card.sorted_sha256 not in (None, digest):
        raise DataError(f"{path}: sorted_sha256 is {digest}, the card says {card.sorted_sha256}; get the file again")
    named = name_sets(sets, card, path)
    genes = None if var_table is None else read_gene_table(var_table)
    ids = sorted({gene for one in named for gene in one.genes})
    fates = resolve(card, ids, _table(card.map, name, access), _table(card.orthologs, name, access), genes)
    mapped = [replace(one, genes=tuple(sorted({s for g in one.genes for s in fates[g].symbols}))) for one in named]
    if not any(one.genes for one in mapped):
        raise DataError(
            f"{path}: none of its {len(ids)} ids (first {ids[0] if ids else 'none'!r}) could be mapped to symbols; "
            "check `ids`, `map` and `orthologs` of the card"
        )
    report = tabulate_mapping(named, mapped, fates, None if genes is None else set(genes["symbol"]))
    with atomic(out.with_name(f"{out.stem}.mapping.csv")) as part:
        report.to_csv(part, index=False, lineterminator="\n")
    with atomic(out) as part:
        part.write_text(format_gmt(mapped), encoding="utf-8")
    return digest


def find_library(source: GeneSetSource, name: str, access: Access, pinned: bool = False) -> Path:
    """The file of a source, fetched where it is on the web; `pinned` says that its content is checked otherwise."""
    if isinstance(source, GeneSetUrl):
        folder = access.data_dir / "downloads"
        return fetch_file(
            source.file, folder, mirror=access.mirror, allow_unpinned=access.allow_unpinned or pinned, progress=False
        )
    path = Path(source.path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{name}: source.path: {path}: {what} (from {Path.cwd()}); correct the path in the card")
    return path


def _table(table: IdTable | None, name: str, access: Access) -> dict[str, tuple[str, ...]] | None:
    return None if table is None else read_id_table(table, find_library(table.source, name, access))


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_gmt(path: Path) -> list[GeneSet]:
    """Sets of a GMT file (may be gzipped), in its order; a gene named twice in a set counts once.

    A weight after a comma (`GENE,1.0`, as Enrichr writes them) is left out. A set without genes is kept, empty.

    Raises
    ------
    DataError
        If the file cannot be read, a line is no gene set, a name comes twice, or there is no set.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as gene sets ({error}); it must be a GMT file, correct the path"
        ) from None
    sets = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < 2 or not fields[0]:
            raise DataError(f"{path}: line {number} is no gene set; a GMT line is name, description, genes, by tabs")
        genes = [gene.partition(",")[0].strip() for gene in fields[2:]]
        genes = [gene for gene in genes if gene]
        distinct = tuple(dict.fromkeys(genes))
        sets.append(GeneSet(fields[0], fields[1], distinct, len(genes) - len(distinct)))
    if not sets:
        raise DataError(f"{path}: holds no gene set; it must be a GMT file, correct the path")
    _refuse_repeated((one.name for one in sets), f"{path}: sets named twice", "make their names unique")
    return sets


def _refuse_repeated(names: Iterable[str], what: str, mend: str) -> None:
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        more = f" and {len(repeated) - _SHOWN} more" if len(repeated) > _SHOWN else ""
        raise DataError(f"{what}: {', '.join(map(repr, repeated[:_SHOWN]))}{more}; {mend}")


def format_gmt(sets: Iterable[GeneSet]) -> str:
    """GMT text of all sets that are not empty, sets by name and genes by name."""
    ordered = sorted((one for one in sets if one.genes), key=lambda one: one.name)
    return "".join("\t".join((one.name, one.description, *sorted(one.genes))) + "\n" for one in ordered)


def hash_sets(sets: Iterable[GeneSet]) -> str:
    """sha256 of the normal form: sorted sets of sorted genes, without descriptions, which change with the export."""
    return sha256_text(format_gmt(replace(one, description="") for one in sets))


def name_sets(sets: Sequence[GeneSet], card: GeneSetCard, path: Path) -> list[GeneSet]:
    """The sets under the names that are shown (`name_pattern`); a shared name gets the set's id appended.

    Raises
    ------
    DataError
        If a name does not match the pattern, or two sets without ids share one.
    """
    if card.name_pattern is None:
        return list(sets)
    pattern, named = re.compile(card.name_pattern), []
    for one in sets:
        found = pattern.fullmatch(one.name)
        if found is None:
            raise DataError(f"{path}: set {one.name!r} does not match the card's name_pattern; correct the pattern")
        parts = found.groupdict()
        named.append((parts["name"].strip(), parts.get("id") or "", one))
    shared = {name for name, n in Counter(name for name, _, _ in named).items() if n > 1}
    shown = [
        replace(one, name=f"{name} ({key})" if name in shared and key else name, description=key or one.description)
        for name, key, one in named
    ]
    _refuse_repeated(
        (one.name for one in shown), f"{path}: name_pattern gives one name to several sets", "add an `id` group"
    )
    return shown


def tabulate_mapping(
    before: Sequence[GeneSet], after: Sequence[GeneSet], fates: dict[str, Fate], data_symbols: set[str] | None
) -> pd.DataFrame:
    """What was lost on the way: a row for the library (distinct ids), then one for each set; columns `MAPPING`."""
    if len(before) != len(after):
        raise ConfigError("gene sets: as many sets must come out as went in")
    repeated = sum(one.n_repeated for one in before)
    whole = dict.fromkeys(gene for one in before for gene in one.genes)
    rows = [_count("library", "", tuple(whole), repeated, fates, data_symbols)]
    order = sorted(range(len(before)), key=lambda i: after[i].name)
    rows += [_count("set", after[i].name, before[i].genes, before[i].n_repeated, fates, data_symbols) for i in order]
    table = pd.DataFrame(rows, columns=list(MAPPING))
    return table.astype({"n_in_data": "Int64"})


def _count(
    level: str, name: str, ids: Sequence[str], n_repeated: int, fates: dict[str, Fate], data_symbols: set[str] | None
) -> tuple[str | int | None, ...]:
    lost = sorted(gene for gene in ids if not fates[gene].symbols)
    reached = [symbol for gene in ids for symbol in fates[gene].symbols]
    distinct = set(reached)
    n_ambiguous = sum(fates[gene].ambiguous for gene in ids)
    n_in_data = None if data_symbols is None else len(distinct & data_symbols)
    return (
        level, name, len(ids), n_repeated, len(ids) - len(lost), len(lost), n_ambiguous, len(reached) - len(distinct),
        len(distinct), n_in_data, ";".join(lost),
    )  # fmt: skip


def read_planted(truth: Path) -> list[str]:
    """Names of the planted sets of a simulation, from its `truth.csv` (column `set`; `none` for other genes).

    Raises
    ------
    DataError
        If it is no such table.
    """
    try:
        sets = pd.read_csv(truth, dtype=str, keep_default_na=False)["set"]
    except (OSError, KeyError, ValueError) as error:
        problem = f"{truth}: no truth of a simulation ({error})"
        raise DataError(f"{problem}; give the truth.csv of `perturbed census simulate`") from None
    return sorted(set(sets) - {"none", ""})
