"""Cells of the Census by a streamed query: bounded memory, checked counts, and interrupted queries gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.census.cells import add_batch, check_counts, check_expectations, write_cells
from perturbed.data.census.filters import as_text, check_columns, check_values, describe_empty, join, widen
from perturbed.data.census.remote import attempts_for, open_census, persist
from perturbed.data.census.spec import BATCH, CensusCard, Clause, QueryCells, SimulationCells, check_gene_id
from perturbed.data.download import write_problem
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.files import atomic, sha256_text

CHUNK_VALUES = 4_000_000
"""Stored values read at a time, where `obs` counts them; some 250 MB with everything that reading needs."""
CHUNK_CELLS = 1024
"""Cells read at a time in releases that do not count values."""

Cells = QueryCells | SimulationCells
PRIMARY = Clause(column="is_primary_data", values=(True,))


@dataclass(frozen=True)
class _Selected:
    """What a query found, before any count is read."""

    obs: pd.DataFrame
    """Indexed by `soma_joinid` as text, ascending."""
    var: pd.DataFrame
    """Indexed by `feature_id`."""
    cells: np.ndarray
    """`soma_joinid` of cells."""
    genes: np.ndarray | None
    """`soma_joinid` of genes; None for all."""
    nnz: np.ndarray | None
    """Stored values of each cell over all genes, where the release says so."""


def query_cells(card: CensusCard, name: str, out: str | Path, *, store: str | Path | None = None) -> None:
    """Read the cells of a card from a Census and write `cells.h5ad`.

    The counts are read in chunks, each kept beside `out` in a hidden folder that is named after the query. Run again
    after an interruption, only the missing chunks are read.

    Parameters
    ----------
    card
        Of kind `query` or `simulation`.
    name
        Its name, for messages.
    out
        The `cells.h5ad` to write: `X` raw counts (CSR float32), `var` indexed by Ensembl id with `feature_name`, `obs`
        with the columns asked for, `soma_joinid` and `batch`, `uns["provenance"]`.
    store
        A store to read instead of the card's; needed for simulated cells.

    Raises
    ------
    ConfigError
        If the release, a column, a value or a gene does not exist.
    DataError
        If no cell matches, or what is read is not what the Census counts.
    FetchError
        If the Census cannot be reached, or the file not be written.
    """
    cells, out = card.cells, Path(out)
    if not isinstance(cells, QueryCells | SimulationCells):
        raise ConfigError(f"{name}: cells.kind is {cells.kind!r}, which is read from a file, not by a query")
    uri = str(store) if store is not None else getattr(cells, "uri", None)
    if uri is None and isinstance(cells, SimulationCells):
        raise ConfigError(f"{name}: simulated cells lie in a store; make it with `perturbed census simulate`")
    with open_census(cells.census_version, uri, name) as census:
        experiment = _experiment(census, cells.organism, name)
        attempts = attempts_for(uri)
        found = persist(lambda: _select(experiment, cells, name), f"{name}: obs", attempts)
        check_expectations(card, found.obs, len(found.var), name)
        summary = _summary(census)
        _check_build(cells, summary, uri, name)
        identity = _identity(cells, uri, found, summary)
        chunks = _Chunks(experiment.ms["RNA"].X["raw"], found, _folder(out), identity, name)
        chunks.read_missing(attempts)
        provenance = {
            "card": name,
            "kind": cells.kind,
            "organism": cells.organism,
            "census_version": cells.census_version,
            "census_version_is": "found by the client" if uri is None else "claimed by the card",
            "uri": str(uri) if uri is not None else census.uri,
            "summary": summary,
            "filter": join(_clauses(cells)),
            "max_cells": cells.max_cells,
            "seed": cells.seed,
            "n_cells": len(found.obs),
            "dataset_ids": sorted(set(found.obs["dataset_id"].astype(str))),
            "versions": {package: version(package) for package in ("cellxgene-census", "tiledbsoma")},
        }
    write_cells(out, found.obs, found.var, chunks.blocks(), provenance)
    shutil.rmtree(chunks.folder, ignore_errors=True)


# --- which cells --------------------------------------------------------------------------------------------------


def _experiment(census: Any, organism: str, name: str) -> Any:
    data = census["census_data"]
    if organism not in data:
        raise ConfigError(f"{name}: cells.organism: the store has no {organism}; it has {', '.join(sorted(data))}")
    return data[organism]


def _summary(census: Any) -> dict[str, str]:
    """What the release says of itself."""
    if "census_info" not in census or "summary" not in census["census_info"]:
        return {}
    table = census["census_info"]["summary"].read(column_names=["label", "value"]).concat().to_pandas()
    wanted = ("census_schema_version", "census_build_date", "dataset_schema_version")
    return {str(k): str(v) for k, v in zip(table["label"], table["value"]) if k in wanted}


def _check_build(cells: Cells, summary: dict[str, str], uri: str | None, name: str) -> None:
    """Refuse a store that was built after the release that the card takes it for; more it does not say of itself."""
    built = summary.get("census_build_date", "")
    if uri is not None and built[:10] > cells.census_version:
        raise ConfigError(
            f"{name}: cells.census_version: {cells.census_version} is before the store at {uri} was built ({built}); "
            "name the release that it is a copy of"
        )


def _clauses(cells: Cells) -> list[Clause | str]:
    return [*([PRIMARY] if cells.primary_only else []), *cells.obs_filter]


def _select(experiment: Any, cells: Cells, name: str) -> _Selected:
    obs, clauses = experiment.obs, _clauses(cells)
    valid = [column for column in obs.schema.names if not column.startswith("SOMA_")]
    check_columns(name, cells.columns, clauses, valid)
    check_values(name, clauses, lambda column: _values(obs, column))
    clauses = [c if isinstance(c, str) else widen(c, lambda column: _values(obs, column)) for c in clauses]
    wanted = dict.fromkeys(["soma_joinid", "is_primary_data", *BATCH, *cells.columns])
    counted = "nnz" in valid
    read = [*wanted, *(["nnz"] if counted and "nnz" not in wanted else [])]
    table = _read_obs(obs, clauses, read, name)
    if table.empty:
        raise DataError(_explain_empty(obs, clauses, name))
    table = table.sort_values("soma_joinid", kind="stable")
    if cells.max_cells is not None and cells.max_cells < len(table):
        rng = np.random.default_rng(cells.seed)
        table = table.iloc[np.sort(rng.choice(len(table), cells.max_cells, replace=False))]
    joinids = table["soma_joinid"].to_numpy()
    nnz = table["nnz"].to_numpy() if counted else None
    table = add_batch(table[list(wanted)].set_index(pd.Index(joinids.astype(str))), name)
    return _Selected(table, *_select_genes(experiment, cells, joinids, name), nnz)


def _read_obs(obs: Any, clauses: Sequence[Clause | str], columns: Sequence[str], name: str) -> pd.DataFrame:
    import tiledbsoma as soma

    try:
        return obs.read(value_filter=join(clauses), column_names=list(columns)).concat().to_pandas()
    except (soma.SOMAError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).partition("At:")[0].split())
        if any(word in reason.lower() for word in ("query condition", "queryfield", "filter", "attribute", "cast")):
            raise ConfigError(f"{name}: cells.obs_filter: {join(clauses)}: {reason[:200]}") from None
        raise


def _values(obs: Any, column: str) -> set[str] | None:
    """Values of a column of categories in this release; None for other columns."""
    import pyarrow as pa

    if not pa.types.is_dictionary(obs.schema.field(column).type):
        return None
    return set(obs.get_enumeration_values([column])[column].to_pylist())


def _explain_empty(obs: Any, clauses: Sequence[Clause | str], name: str) -> str:
    left = [
        (as_text(clause), len(_read_obs(obs, clauses[: i + 1], ["soma_joinid"], name)))
        for i, clause in enumerate(clauses)
    ]
    return describe_empty(name, int(obs.count), left)


def _select_genes(
    experiment: Any, cells: Cells, joinids: np.ndarray, name: str
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray | None]:
    columns = ["soma_joinid", "feature_id", "feature_name"]
    table = experiment.ms["RNA"].var.read(column_names=columns).concat().to_pandas().sort_values("soma_joinid")
    problem = check_gene_id(str(table["feature_id"].iloc[0]), cells.organism)
    if problem is not None:
        raise DataError(f"{name}: var: {problem}; the store is not what its organism says")
    genes = None
    if cells.genes is not None:
        wanted = {gene.partition(".")[0] for gene in cells.genes}
        missing = sorted(wanted - set(table["feature_id"]))
        if missing:
            raise ConfigError(
                f"{name}: cells.genes: {missing[0]!r} is not in Census {cells.census_version} ({len(missing)} of "
                f"{len(wanted)} are not); take them out"
            )
        table = table[table["feature_id"].isin(wanted)]
        genes = table["soma_joinid"].to_numpy()
    index = pd.Index(table["feature_id"].to_numpy(dtype=object), name="feature_id")
    return pd.DataFrame({"feature_name": table["feature_name"].to_numpy(dtype=object)}, index=index), joinids, genes


# --- counts, chunk by chunk ---------------------------------------------------------------------------------------


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _identity(cells: Cells, uri: str | None, found: _Selected, summary: dict[str, str]) -> str:
    """Hash of everything that the chunks depend on, as far as the store tells it without its counts."""
    joinids = hashlib.sha256(found.cells.astype("<i8").tobytes()).hexdigest()
    nnz = None if found.nnz is None else hashlib.sha256(found.nnz.astype("<i8").tobytes()).hexdigest()
    genes = None if found.genes is None else found.genes.tolist()
    sizes = [CHUNK_VALUES, CHUNK_CELLS]
    content = [cells.organism, cells.census_version, uri, joinids, nnz, summary, genes, list(found.var.index), sizes]
    return sha256_text(json.dumps(content))[:16]


class _Chunks:
    """The counts of the cells in parts, each a file."""

    def __init__(self, array: Any, found: _Selected, folder: Path, identity: str, name: str) -> None:
        self.array, self.found, self.name = array, found, name
        self.folder = folder
        self.inside = folder / identity
        self.spans = list(_spans(found))

    def read_missing(self, attempts: int) -> None:
        """Read the chunks that are not there yet."""
        from tqdm import tqdm

        try:
            for other in self.folder.glob("*"):
                if other != self.inside:
                    shutil.rmtree(other)  # of another query of the same name
            self.inside.mkdir(parents=True, exist_ok=True)
            missing = [k for k in range(len(self.spans)) if self._load(k) is None]
            if len(missing) < len(self.spans):
                kept = len(self.spans) - len(missing)
                print(f"{self.name}: goes on; {kept} of {len(self.spans)} chunks are here", file=sys.stderr)
            done = sum(s.stop - s.start for k, s in enumerate(self.spans) if k not in set(missing))
            with tqdm(
                desc=self.name, total=len(self.found.cells), initial=done, unit="cell", disable=not sys.stderr.isatty()
            ) as bar:
                for k in missing:
                    span = self.spans[k]
                    block = persist(lambda span=span: self._read(span), f"{self.name}: counts", attempts)  # type: ignore[misc]
                    self._keep(k, block)
                    bar.update(span.stop - span.start)
        except OSError as error:
            raise FetchError(write_problem(self.folder, error)) from None

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        """All chunks in order."""
        for k in range(len(self.spans)):
            block = self._load(k)
            if block is None:
                raise DataError(f"{self._path(k)}: is broken; run again")
            yield block

    def _path(self, k: int) -> Path:
        return self.inside / f"{k:06d}.npz"

    def _keep(self, k: int, block: sparse.csr_matrix) -> None:
        with atomic(self._path(k)) as part:
            np.savez(part, data=block.data, indices=block.indices, indptr=block.indptr)

    def _load(self, k: int) -> sparse.csr_matrix | None:
        """A chunk that is there and whole; zip files carry checksums of their content."""
        path, span = self._path(k), self.spans[k]
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                shape = (span.stop - span.start, len(self.found.var))
                block = sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
            self._compare(span, np.diff(block.indptr))
            return block
        except (OSError, ValueError, KeyError, BadZipFile, EOFError, DataError):
            path.unlink(missing_ok=True)
            return None

    def _read(self, span: slice) -> sparse.csr_matrix:
        """Counts of some cells, canonical CSR float32, compared with what the release counts."""
        found = self.found
        ids = found.cells[span]
        rows, columns, values = [], [], []
        for table in self.array.read((ids, slice(None) if found.genes is None else found.genes)).tables():
            rows.append(np.asarray(table["soma_dim_0"]))
            columns.append(np.asarray(table["soma_dim_1"]))
            values.append(np.asarray(table["soma_data"], dtype=np.float32))
        row, column = (np.concatenate([*parts, np.empty(0, dtype=np.int64)]) for parts in (rows, columns))
        value = np.concatenate([*values, np.empty(0, dtype=np.float32)])
        check_counts(value, f"{self.name}: X['raw']")
        place = np.searchsorted(ids, row).clip(max=len(ids) - 1)
        if (ids[place] != row).any():
            raise DataError(f"{self.name}: X['raw'] gave cells that were not asked for; the store is broken")
        if found.genes is not None:
            column = np.searchsorted(found.genes, column)
        shape = (len(ids), len(found.var))
        block = sparse.csr_matrix(sparse.coo_matrix((value, (place, column)), shape=shape))
        if block.nnz != len(value):
            raise DataError(f"{self.name}: X['raw'] gave {len(value) - block.nnz:,} values twice; the store is broken")
        self._compare(span, np.diff(block.indptr))
        return block

    def _compare(self, span: slice, stored: np.ndarray) -> None:
        if self.found.nnz is None:
            if self.found.genes is None and not stored.all():
                empty = np.flatnonzero(stored == 0)
                raise DataError(
                    f"{self.name}: cell {self.found.cells[span][empty[0]]} has no value in X['raw'] ({len(empty):,} "
                    "such cells); the store is broken"
                )
            return
        expected = self.found.nnz[span]
        wrong = stored != expected if self.found.genes is None else stored > expected
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{self.name}: cell {self.found.cells[span][k]} has {stored[k]:,} values in X['raw'], but obs counts "
                f"{expected[k]:,} ({int(wrong.sum()):,} such cells); the store is broken, or was changed meanwhile"
            )


def _spans(found: _Selected) -> Iterator[slice]:
    """Consecutive cells with about `CHUNK_VALUES` values."""
    n, start = len(found.cells), 0
    total = None if found.nnz is None else np.concatenate([[0], np.cumsum(found.nnz, dtype=np.int64)])
    while start < n:
        stop = start + CHUNK_CELLS
        if total is not None:
            stop = int(np.searchsorted(total, total[start] + CHUNK_VALUES, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        yield slice(start, stop)
        start = stop
