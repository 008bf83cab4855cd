"""A record beside every result: what made it, from what, with which versions, how long and how much memory it took."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from perturbed.errors import DataError
from perturbed.files import hash_file, write_json

PACKAGES = (
    "perturbed",
    "anndata",
    "cellxgene-census",
    "gseapy",
    "numpy",
    "pandas",
    "scanpy",
    "scikit-learn",
    "scipy",
    "scvi-tools",
    "snakemake",
    "tiledbsoma",
    "torch",
)


SUFFIX = ".provenance.json"
SKEW = 5.0
"""Seconds by which clocks may differ."""
STAMP = ".snakemake_timestamp"
"""File in a folder whose time Snakemake takes for the folder's."""
DRAWN = (".svg", ".png", ".csv")
"""What a figure consists of; the three have one record, under their common stem."""


def record_path(output: str | Path) -> Path:
    """Where the record of `output` lies: `scores.parquet` has `scores.parquet.provenance.json` beside it."""
    output = Path(output)
    output = output if output.name else output.absolute()  # `.`, the folder at hand
    return output.with_name(f"{output.name}{SUFFIX}")


@contextmanager
def recorded(
    verb: str,
    output: str | Path,
    inputs: Mapping[str, str | Path | None],
    settings: Mapping[str, Any],
    *,
    read: Sequence[str | Path] = (),
    beside: Sequence[str | Path | None] = (),
) -> Iterator[dict[str, Any]]:
    """Time the body and write its record when it succeeds; the body may add keys such as `device`.

    `inputs` and `read`, which are not described one by one, are first held against their own records (`check_whole`).
    Each of `beside`, what the body writes beside `output`, gets a record, too; an `output` that is the stem of a figure
    has one for its three files. While the body runs the records of an
    earlier run are set aside: were it killed, they would speak of another file.

    Raises
    ------
    DataError
        If an input is not what it was when it was made.
    """
    check_whole(*(path for path in inputs.values() if path is not None), *read)
    outputs = [output, *(path for path in beside if path is not None)]
    extra: dict[str, Any] = {}
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    with _set_aside([record_path(path) for path in outputs]):
        yield extra
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "verb": verb,
        "command": sys.argv,
        "settings": dict(settings),
        "inputs": {name: _describe(path) for name, path in inputs.items() if path is not None},
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.monotonic() - clock, 3),
        "peak_memory_mb": round(peak_kib / 1024, 1),
        "machine": {"system": platform.platform(), "cpu": platform.machine(), "python": platform.python_version()},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git_commit(),
        **extra,
    }
    for path in filter(lambda path: Path(path).exists() or path == output, outputs):
        write_json(record_path(path), {**record, "output": {**_describe(path), **_measure(Path(path))}})


@contextmanager
def _set_aside(records: Sequence[Path]) -> Iterator[None]:
    """Give records the temporary name that `write_json` clears away; bring them back if the body fails."""
    aside = {record: record.with_name(f".part.{record.name}") for record in records if record.is_file()}
    for record, name in aside.items():
        os.replace(record, name)
    try:
        yield
    except BaseException:
        for record, name in aside.items():
            os.replace(name, record)
        raise


def check_whole(*paths: str | Path) -> None:
    """Refuse files, and folders with files, that are not as long as when they were made.

    A power cut, a full disk under a copy or a broken transfer leaves files that are empty or end in the middle. Half a
    csv or GMT reads as a shorter one, so the sizes in the records are compared. What has no record (a user's own file)
    or is missing (its reader says so) is passed over.

    Raises
    ------
    DataError
        Names the first such file, both sizes and the mend.
    """
    for path in map(Path, paths):
        whole = path.absolute()
        if not path.exists() or not whole.name:
            continue
        for record in map(record_path, (whole, whole.parent, whole.with_suffix(""))):
            about = {file: size for file, size in _read_sizes(record).items() if whole in (file, *file.parents)}
            for file, problem in _compare(about):
                raise DataError(
                    f"{path / file.relative_to(whole)}: {problem}; delete {_remade(record, file).name} and rerun the "
                    f"stage that makes it (or, if you changed it on purpose, delete {record.name})"
                )


def set_aside_torn(*folders: str | Path, only_say: bool = False) -> list[str]:
    """Give torn outputs another name, so that Snakemake, for which a file that exists is done, makes them anew.

    Parameters
    ----------
    folders
        Searched for records.
    only_say
        Change nothing.

    Returns
    -------
    list of str
        A line for each.
    """
    told = "a run that is no dry run, and has the folder to itself, makes it anew"
    lines: dict[Path, str] = {}
    for record in (Path(path) for folder in folders for path in _find_records(str(folder))):
        sizes = _read_sizes(record)
        for file, problem in _compare(sizes):
            path = _remade(record, file)
            # What is missing is made anew anyway; and another run may have made it anew between two looks.
            if path in lines or not path.exists() or _read_sizes(record) != sizes:
                continue
            lines[path] = f"{file}: {problem}; {told if only_say else _rename_torn(path)}"
    return list(lines.values())


def date_back(*folders: str | Path, only_say: bool = False) -> list[str]:
    """Date as of now what a skewed clock has dated in the future: it would be newer than all that is ever made of it.

    `folders` and `only_say` are as in `set_aside_torn`. Returns one line where there is such an output, else none.
    """
    now, ahead = time.time(), []
    for record in (Path(path) for folder in folders for path in _find_records(str(folder))):
        remade = {_remade(record, file) for file in _read_sizes(record)}
        for path in (one / STAMP if one.is_dir() else one for one in remade):
            if path.exists() and path.stat().st_mtime > now + SKEW:
                ahead.append(path)
    if not ahead:
        return []
    told = f"{ahead[0]}: dated in the future, {len(ahead)} outputs in all; check the clocks"
    if only_say:
        return [f"{told}; a run that is no dry run dates them as of now"]
    try:
        for path in ahead:
            os.utime(path, (now, now))
    except OSError as error:
        return [f"{told}; they cannot be dated back ({error.strerror})"]
    return [f"{told}; dated as of now, so that what depends on them runs once more at most"]


def _rename_torn(path: Path) -> str:
    names = (path.with_name(f"{path.name}.torn{n or ''}") for n in count())
    aside = next(name for name in names if not name.exists())
    try:
        path.rename(aside)
    except OSError as error:
        return f"cannot be renamed ({error.strerror}); delete it"
    return f"kept as {aside.name}, and made anew where it is needed"


def _compare(sizes: Mapping[Path, int]) -> Iterator[tuple[Path, str]]:
    """Files that are not as long as they were, and what is wrong with each."""
    for file, size in sizes.items():
        try:
            status = file.stat()
            found = status.st_size if stat.S_ISREG(status.st_mode) else None
        except OSError:
            found = None
        if found != size:
            is_now = "is missing" if found is None else f"has {found:,} bytes"
            yield file, f"{is_now}, but had {size:,} when it was made"


def _read_sizes(record: Path) -> dict[Path, int]:
    """Files that a record speaks of, and how long they were."""
    output, said = record.with_name(record.name.removesuffix(SUFFIX)), _read_output(record)
    sizes = {output: said["bytes"]} if "bytes" in said else {}
    sizes |= {output / name: size for name, size in said.get("files", {}).items()}
    return sizes | {output.with_name(f"{output.name}{kind}"): size for kind, size in said.get("figure", {}).items()}


def _remade(record: Path, file: Path) -> Path:
    """What a torn file is remade with: itself, or the folder that the record is about."""
    return file if file.parent == record.parent else record.with_name(record.name.removesuffix(SUFFIX))


def _find_records(folder: str, links: frozenset[str] = frozenset()) -> Iterator[str]:
    """Records below a folder; not within folders that have one themselves, nor in hidden ones."""
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry for entry in found if not entry.name.startswith(".")}
    except OSError:
        return
    for name, entry in sorted(entries.items()):
        if name.endswith(SUFFIX):
            yield entry.path
        elif entry.is_dir() and f"{name}{SUFFIX}" not in entries:
            place = os.path.realpath(entry.path) if entry.is_symlink() else None
            if place not in links:  # a link that leads back up ends here
                yield from _find_records(entry.path, links | {place} if place else links)


def _measure(path: Path) -> dict[str, Any]:
    """Size of a file, of every file of a folder, or of the files of a figure, given by its stem."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {"files": {str(file.relative_to(path)): file.stat().st_size for file in files}}
    if path.is_file():
        return {"bytes": path.stat().st_size}
    drawn = {suffix: path.with_name(f"{path.name}{suffix}") for suffix in DRAWN}
    sizes = {suffix: file.stat().st_size for suffix, file in drawn.items() if file.is_file()}
    return {"figure": sizes} if sizes else {}


def _read_output(record: Path) -> dict[str, Any]:
    """What a record says of its output; nothing where it is missing or broken."""
    try:
        output = json.loads(record.read_text(encoding="utf-8"))["output"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return output if isinstance(output, dict) else {}


def _describe(path: str | Path) -> dict[str, Any]:
    """Path and sha256; taken from the record beside the file where that is as new, so that it is computed once."""
    path = Path(path)
    if not path.is_file():
        return {"path": str(path)}
    beside = record_path(path)
    if beside.is_file() and beside.stat().st_mtime >= path.stat().st_mtime:
        known = _read_output(beside).get("sha256")
        if known:
            return {"path": str(path), "sha256": known}
    return {"path": str(path), "sha256": hash_file(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout, with `+changes` where tracked files differ from it; None outside of one."""
    folder = Path(__file__).parent
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
