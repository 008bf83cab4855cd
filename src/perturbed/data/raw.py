"""From fetched files to `raw.h5ad`: the source's own values and names, with a record of where they came from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from perturbed.data.cards import Card, Expectations, RemoteFile
from perturbed.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 2**22
"""Values looked at in one go."""
MAX_LOG1P = 25.0
"""log1p-normalised values stay below this; what is larger and not integer is something else."""


# --- writing ------------------------------------------------------------------------------------------------------


def write_raw(
    paths: Sequence[Path], out: Path, provenance: str, name: str, described: Sequence[RemoteFile] = ()
) -> None:
    """Write `out` from one h5ad, or from a Matrix Market file with its tables.

    An h5ad is copied byte for byte and only `uns["provenance"]` is added (the source's own, if any, becomes
    `uns["source_provenance"]`), so a matrix larger than memory passes, and values, encodings and names stay.

    Parameters
    ----------
    paths
        The files.
    out
        The h5ad to write; not atomic, the caller sees to that.
    provenance
        JSON text.
    name
        The data set, for messages.
    described
        The card's entries of the files, in their order; those with a `role` are read by it.

    Raises
    ------
    DataError
        If the files are broken or of another kind.
    """
    if any(file.role is not None for file in described):
        from perturbed.data.triples import read_by_role

        read_by_role(paths, described, name).write_h5ad(out, compression="gzip", compression_opts=1)
    elif len(paths) == 1 and paths[0].suffix == ".h5ad":
        check_h5ad(paths[0], name)
        shutil.copyfile(paths[0], out)
    elif any(".mtx" in path.suffixes for path in paths):
        read_triple(paths, name).write_h5ad(out, compression="gzip", compression_opts=1)
    else:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{name}: source.files: {names}: give one h5ad, or matrix.mtx with genes and barcodes")
    with h5py.File(out, "r+") as file:
        if "uns" not in file:
            file.create_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        uns = file["uns"]
        if "provenance" in uns:  # what the source itself says stays
            if "source_provenance" in uns:
                del uns["source_provenance"]
            uns.move("provenance", "source_provenance")
        uns.create_dataset("provenance", data=provenance, dtype=h5py.string_dtype())
        uns["provenance"].attrs.update({"encoding-type": "string", "encoding-version": "0.2.0"})


def check_h5ad(path: str | Path, name: str) -> None:
    """Check that a file is an h5ad that current readers read.

    Raises
    ------
    DataError
        If it is no HDF5 file, is truncated, holds no matrix, or uses the encoding of h5sparse (before 2019).
    """
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in ("X", "obs", "var") if key not in file]
            legacy = "X" in file and any(key.startswith("h5sparse") for key in file["X"].attrs)
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{name}: {path}: not a readable h5ad ({reason}); delete it and fetch it anew") from None
    if missing:
        raise DataError(f"{name}: {path}: holds no {missing[0]}, so it is no h5ad; correct source.path or source.files")
    if legacy:
        raise DataError(
            f"{name}: {path}: X is in the old h5sparse encoding; read it with anndata below 0.11, save it and use that"
        )


def read_triple(paths: Sequence[Path], name: str) -> AnnData:
    """Read `matrix.mtx` (genes × cells), its genes and barcodes and, where given, a csv of cells; all may be gzipped.

    Genes: a table without header, id in the first column and symbol in the second. Cells of the csv are matched to the
    barcodes by its first column; cells it does not name get missing values.

    Raises
    ------
    DataError
        If a file is missing or the lengths do not fit.
    """
    import anndata
    import pandas as pd
    from scipy import sparse
    from scipy.io import mmread

    found = {role: _pick(paths, words, name) for role, words in ROLES.items()}
    try:
        matrix = sparse.csr_matrix(mmread(found["matrix"]).T)
        genes = pd.read_csv(found["genes"], sep="\t", header=None, dtype=str, keep_default_na=False)
        cells = pd.read_csv(found["barcodes"], sep="\t", header=None, dtype=str)[0]
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{name}: {found['matrix']} or its tables cannot be read ({reason}); fetch them anew") from None
    if matrix.shape != (len(cells), len(genes)):
        raise DataError(
            f"{name}: {found['matrix']}: {matrix.shape[1]} genes × {matrix.shape[0]} cells, but {len(genes)} genes "
            f"and {len(cells)} barcodes are named; the files do not belong together"
        )
    var = pd.DataFrame(index=pd.Index(genes[0], name="gene_id"))
    if genes.shape[1] > 1:
        var["symbol"] = genes[1].to_numpy()
    obs = pd.DataFrame(index=pd.Index(cells, name="cell"))
    tables = [path for path in paths if ".csv" in path.suffixes]
    if tables:
        table = pd.read_csv(tables[0], index_col=0)
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            raise DataError(f"{name}: {tables[0]}: cell {twice!r} stands in two rows; one is needed")
        obs = table.reindex(obs.index)
    return anndata.AnnData(matrix, obs=obs, var=var)


ROLES = {"matrix": (".mtx",), "genes": ("genes", "features"), "barcodes": ("barcodes",)}
"""What tells the files of a triple, in their names."""


def _pick(paths: Sequence[Path], words: tuple[str, ...], name: str) -> Path:
    found = [path for path in paths if any(word in path.name for word in words) and ".csv" not in path.suffixes]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise DataError(f"{name}: source.files: {what} with {' or '.join(words)} in the name; one is needed")
    return found[0]


# --- checking -----------------------------------------------------------------------------------------------------


def check_raw(path: str | Path, card: Card, name: str) -> None:
    """Check the expectations of a card that can be seen before labels are read.

    `n_obs`, `n_vars` (where `expect.stage` is raw), and `values` and `x_sum` of the matrix that `keys.counts` names
    (`X` where it names none). Matrices are read in blocks.

    Raises
    ------
    DataError
        One line with everything that differs, or if `keys.counts` names a layer that is not there.
    """
    expect = card.expect
    where = f"{name}: {path}"
    seen: dict[str, int | float | str] = {}
    with h5py.File(path, "r") as file:
        n_obs, n_vars = _shape(file["X"])
        if expect.stage == "raw":
            seen |= {"n_obs": n_obs, "n_vars": n_vars}
        counts = card.keys.counts
        if counts not in (None, "X") and counts not in file.get("layers", ()):
            layers = ", ".join(file.get("layers", ())) or "none"
            raise DataError(f"{where}: keys.counts: no layer {counts!r}; the file has: {layers}")
        matrix = file["X"] if counts in (None, "X") else file["layers"][counts]
        if expect.values is not None:
            seen["values"] = kind_of_values(matrix)
        if expect.x_sum is not None and expect.stage == "raw":
            seen["x_sum"] = sum(float(np.sum(block, dtype=np.float64)) for block in _blocks(matrix))
    check_expectations(seen, expect, where)


def check_expectations(counts: Mapping[str, int | float | str], expect: Expectations, where: str) -> None:
    """Compare what was found with what the card expects; what the card leaves open is not compared.

    Parameters
    ----------
    counts
        Found values by the name of the key in `expect`; `x_sum` may differ by 1e-6 of itself, the rest not at all.
    expect
        The card's expectations.
    where
        Start of the message: data set or file.

    Raises
    ------
    DataError
        One line with everything that differs.
    """
    unknown = set(counts) - set(Expectations.model_fields)
    if unknown:
        raise ValueError(f"no such expectation: {', '.join(sorted(unknown))}")
    problems = []
    for key, found in counts.items():
        expected = getattr(expect, key)
        same = expected is None or expected == found
        if key == "x_sum" and expected is not None:
            same = abs(float(found) - expected) <= 1e-6 * abs(expected)
        if not same:
            problems.append(f"{key} is {found} but the card expects {expected}")
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}; the file differs from the card's, or the card is wrong")


def kind_of_values(matrix: Any) -> str:
    """`counts` (whole numbers), `log1p` (within 0 and 25), else what else they are; a matrix as h5py shows it."""
    whole, largest = True, 0.0
    for block in _blocks(matrix):
        if not np.isfinite(block).all():
            return "not finite (NaN or inf)"
        if block.min(initial=0) < 0:
            return "negative"
        whole = whole and bool((block == np.floor(block)).all())
        largest = max(largest, float(block.max(initial=0)))
    if whole:
        return "counts"
    return "log1p" if largest < MAX_LOG1P else f"neither counts nor log1p (maximum {largest:.6g})"


def _shape(matrix: Any) -> tuple[int, int]:
    if isinstance(matrix, h5py.Dataset):
        return int(matrix.shape[0]), int(matrix.shape[1])
    shape = matrix.attrs.get("shape")
    return int(shape[0]), int(shape[1])


def _blocks(matrix: Any) -> Iterator[np.ndarray]:
    """The stored values in blocks: rows of a dense matrix, the data of a sparse one."""
    values = matrix if isinstance(matrix, h5py.Dataset) else matrix["data"]
    step = max(1, BLOCK // max(1, int(np.prod(values.shape[1:], dtype=np.int64))))
    for start in range(0, values.shape[0], step):
        yield np.asarray(values[start : start + step])
