"""What figures read: tables of the summary, differences per gene, embeddings and training histories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from perturbed.config import StatisticsSpec
from perturbed.errors import DataError

_TEXT = (
    "dataset", "split", "method", "metric", "perturbation", "subgroup", "context", "baseline", "family", "note",
    "floor_method", "kind", "stratum", "positive", "gene", "term",
)  # fmt: skip


class NothingToDraw(Exception):
    """The input is in order, but this figure has nothing to show for this run; the figure then says so."""


@dataclass(frozen=True)
class FigureInputs:
    """Files a figure may read; each figure names those it needs.

    Parameters
    ----------
    tables
        Folder that `summarise` wrote.
    deltas
        `deltas.parquet` files: dataset, split, fold, method, seed, perturbation, context, gene, observed, predicted.
    embeddings
        `embedding.csv` files: dataset, split, method, perturbation, context, kind (observed, predicted, control),
        pc1, pc2.
    histories
        `training.csv` files: dataset, split, fold, method, seed, epoch, term, value.
    """

    tables: Path | None = None
    deltas: tuple[Path, ...] = ()
    embeddings: tuple[Path, ...] = ()
    histories: tuple[Path, ...] = ()

    @classmethod
    def from_files(cls, tables: Path | None = None, files: Iterable[Path] = ()) -> FigureInputs:
        """Sort files by their names; of a folder, the `deltas.parquet` and `embedding.csv` in it.

        Raises
        ------
        DataError
            If a file is of no known kind.
        """
        found: dict[str, list[Path]] = {"deltas": [], "embeddings": [], "histories": []}
        for path in map(Path, files):
            if path.is_dir():
                found["deltas"].append(path / "deltas.parquet")
                found["embeddings"].append(path / "embedding.csv")
            elif path.suffix == ".parquet":
                found["deltas"].append(path)
            elif path.suffix == ".csv":
                found["embeddings" if path.name.startswith("embedding") else "histories"].append(path)
            else:
                raise DataError(f"{path}: no such folder, and no deltas.parquet, embedding.csv or training.csv")
        return cls(tables, **{kind: tuple(paths) for kind, paths in found.items()})


@dataclass(frozen=True)
class Page:
    """One figure: of one dataset and split, or of all where both are empty."""

    name: str
    inputs: FigureInputs
    dataset: str
    split: str
    spec: StatisticsSpec
    titles: Mapping[str, str]

    def table(self, name: str) -> pd.DataFrame:
        """Rows of this dataset and split in `name.csv` of the tables folder.

        Raises
        ------
        DataError
            If no folder is given, the file is missing, or it has no such row.
        """
        if self.inputs.tables is None:
            raise DataError(
                f"figure {self.name}: needs the folder of summary tables; make it with `perturbed summarise`"
            )
        path = self.inputs.tables / f"{name}.csv"
        return self._select([_read_csv(path, "summarise")], path)

    def embeddings(self) -> pd.DataFrame:
        """Rows of this dataset and split in the embeddings."""
        paths = self._given("embeddings", "embedding.csv", "evaluate")
        return self._select([_read_csv(path, "evaluate") for path in paths], paths[0])

    def histories(self) -> pd.DataFrame:
        """Rows of this dataset and split in the training histories."""
        paths = self._given("histories", "training.csv", "fit")
        return self._select([_read_csv(path, "fit") for path in paths], paths[0])

    def deltas(self, columns: Sequence[str], **equal: str) -> pd.DataFrame:
        """Rows of this dataset and split in the differences per gene, where columns have the values in `equal`."""
        paths = self._given("deltas", "deltas.parquet", "evaluate")
        wanted = {"dataset": self.dataset, "split": self.split, **equal}
        wanted = {column: value for column, value in wanted.items() if value}
        parts, n_read = [], 0
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: no such file; make it with `perturbed evaluate`")
            try:
                part = pd.read_parquet(path, columns=[*dict.fromkeys([*wanted, *columns])])
            except (OSError, ValueError, KeyError) as error:
                raise DataError(
                    f"{path}: not a readable table of deltas ({' '.join(str(error).split())[:120]})"
                ) from None
            n_read += len(part)
            for column, value in wanted.items():
                part = part[part[column] == value]
            parts.append(part)
        if n_read and not any(map(len, parts)):
            raise self._no_row(paths[0])
        return self._select(parts, paths[0])

    def _given(self, kind: str, file: str, verb: str) -> tuple[Path, ...]:
        paths: tuple[Path, ...] = getattr(self.inputs, kind)
        if not paths:
            raise DataError(f"figure {self.name}: needs at least one {file}; make it with `perturbed {verb}`")
        return paths

    def _select(self, parts: Sequence[pd.DataFrame], path: Path) -> pd.DataFrame:
        parts = [part for part in parts if len(part)]
        if not parts:
            raise NothingToDraw(f"{path.name} holds no row; see the caption for what this figure needs")
        joined = pd.concat(parts, ignore_index=True)
        for column in ("dataset", "split"):
            name = getattr(self, column)
            joined = joined[joined[column] == name] if name else joined
        if joined.empty:
            raise self._no_row(path)
        return joined.reset_index(drop=True)

    def _no_row(self, path: Path) -> DataError:
        where = f"dataset {self.dataset or 'any'!r}, split {self.split or 'any'!r}"
        return DataError(
            f"figure {self.name}: {path} has no row for {where}; check the names or rerun the stage before"
        )


def _read_csv(path: Path, verb: str) -> pd.DataFrame:
    try:
        # A gene may be called NA or NaN; only an empty field is missing.
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(_TEXT, str))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `perturbed {verb}`") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a readable csv ({reason}); delete it and rerun `perturbed {verb}`") from None
    missing = {"dataset", "split"} - set(table.columns)
    if missing:
        raise DataError(f"{path}: column {sorted(missing)[0]!r} is missing; make the file with `perturbed {verb}`")
    return table.fillna(dict.fromkeys([column for column in _TEXT if column in table], ""))
