"""Collect what a run gets from elsewhere in one folder, to be carried to a machine without internet.

In the folder each file lies under the name that its card gives it; `perturbed.data.fetch` looks there by name and hash.
What a run gets from elsewhere is known to `perturbed.data.needs`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbed.data.cards import RemoteFile
from perturbed.data.census.spec import CensusCard, QueryCells
from perturbed.data.download import write_problem
from perturbed.data.fetch import STATE, hashed, localhost_allowed, obtain, read_record, say
from perturbed.data.needs import Made, Needs, cards_of, find_needs, slice_name
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.files import atomic, hash_file, write_json, write_text

if TYPE_CHECKING:
    from perturbed.plan import Plan

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"


# --- filling the folder -------------------------------------------------------------------------------------------


def mirror_run(plan: Plan, folder: str | Path, *, allow_unpinned: bool = False, progress: bool = True) -> Path:
    """Collect all that a run gets from elsewhere.

    What lies in the run's own folder of downloads, or in its `mirror` where that is a folder of this machine, is copied
    from there; the rest is downloaded.

    Parameters
    ----------
    plan
        The run.
    folder
        The mirror; one that holds files of other runs already keeps them.
    allow_unpinned
        Accept files whose hash nobody has pinned, as does `allow_unpinned` of the run.
    progress
        Draw progress bars on stderr.

    Returns
    -------
    Path
        The manifest.

    Raises
    ------
    PerturbedError
        One line: as `collect` raises.
    """
    needs = find_needs(cards_of(plan))
    config = plan.config
    near = [Path(config.data) / "downloads", *([] if config.mirror is None else [Path(config.mirror)])]
    manifest = collect(
        needs, folder, near=near, allow_unpinned=allow_unpinned or config.allow_unpinned, progress=progress
    )
    for path, user in needs.local.items():
        say(f"{path} ({user}) is a file of this machine and not in the mirror; carry it to the same place")
    for name, case in plan.axes.cases.items():
        if case.judge.provider == "openai":
            where = case.judge.base_url or "a service on the internet"
            say(f"the judge of axes.{name} asks {where}; without it set `judge: {{provider: replay}}` or none")
    for name in plan.environments:
        say(f"the environment .envs/{name} is not in the mirror; docs/offline.md says how to carry it")
    return manifest


def collect(
    needs: Needs,
    folder: str | Path,
    *,
    near: Sequence[Path] = (),
    allow_unpinned: bool = False,
    allow_insecure: bool = False,
    progress: bool = True,
) -> Path:
    """Put everything that is needed into one folder, checked against size and hash.

    What is there already is hashed and kept, half a download is gone on with. `manifest.json` (name, bytes, hashes,
    origin, users) and `SHA256SUMS` (for `sha256sum -c`) are written last, and name what earlier calls collected too.

    Parameters
    ----------
    needs
        What is wanted.
    folder
        The mirror.
    near
        Folders of this machine looked in before the addresses, by name and hash.
    allow_unpinned
        Accept files whose hash nobody has pinned.
    allow_insecure
        Accept `http://localhost` and `file://` addresses.
    progress
        Draw progress bars on stderr.

    Returns
    -------
    Path
        The manifest.

    Raises
    ------
    ConfigError
        If the folder holds another file of that name, of another run.
    FetchError
        If a file has no hash, cannot be had, or the folder cannot be written or has too little room.
    """
    folder = Path(folder)
    if not allow_unpinned:
        _refuse_unpinned(needs)
    _check_folder(folder)
    known = {entry["name"]: entry for entry in read_manifest(folder)}
    _refuse_other(needs, known, folder)
    _check_room(needs, folder)
    insecure, total = allow_insecure or localhost_allowed(), len(needs.files) + len(needs.made)
    for number, name in enumerate(sorted([*needs.files, *needs.made]), start=1):
        _drop_damaged(folder, name, known.get(name))
        users = [*needs.users[name], *known.get(name, {}).get("users", ())]
        say(f"{number} of {total}: {name}, for {', '.join(needs.users[name])}")
        if name in needs.files:
            unpinned = allow_unpinned or name in needs.vouched
            origin = _collect_file(needs.files[name], folder, near, unpinned, insecure, progress)
        else:
            origin = _collect_made(needs.made[name], folder, near)
        known[name] = _describe(folder, name, users, origin)
    return _write_manifest(folder, known.values())


def _collect_file(
    files: Sequence[RemoteFile],
    folder: Path,
    near: Sequence[Path],
    allow_unpinned: bool,
    insecure: bool,
    progress: bool,
) -> str:
    """Get one file, checked for every member that is wanted of it; its origin where that is news."""
    name, origin = files[0].name, ""
    others = [other for other in near if other.resolve() != folder.resolve()]
    source = next((other for other in others if (other / name).is_file()), None)
    for file in files:
        path = obtain(file, folder, source, allow_unpinned, insecure, progress)
        if source is not None and path.parent != folder:
            _copy_in(path, folder / name)
            record = read_record(source, name)
            origin = record.origin if record is not None and record.origin else str(source)
    return origin


def _collect_made(made: Made, folder: Path, near: Sequence[Path]) -> str:
    """Make one file, or copy it from where it was made before; its origin where that is news."""
    target = folder / made.name
    if target.is_file():
        return ""
    for other in near:
        found = find_made(other, made.name) if other.resolve() != folder.resolve() else None
        if found is not None:
            _copy_in(found, target)
            return str(other)
    try:
        made.make(target)
    except OSError as error:
        raise FetchError(write_problem(target, error)) from None
    return made.origin


def _copy_in(source: Path, target: Path) -> None:
    try:
        with atomic(target) as part:
            shutil.copyfile(source, part)
    except OSError as error:
        raise FetchError(write_problem(target, error)) from None


def _describe(folder: Path, name: str, users: Iterable[str], origin: str) -> dict[str, Any]:
    record = hashed(folder / name, folder, ("sha256", "md5"), origin)
    entry = {"name": name, "bytes": record.size, **record.hashes, "origin": record.origin, "date": record.date}
    return entry | {"users": sorted(set(users))}


def _write_manifest(folder: Path, entries: Iterable[dict[str, Any]]) -> Path:
    entries = sorted(entries, key=lambda entry: str(entry["name"]))
    try:
        write_text(folder / SUMS, "".join(f"{entry['sha256']}  {entry['name']}\n" for entry in entries))
        write_json(folder / MANIFEST, entries)
    except OSError as error:
        raise FetchError(write_problem(folder / MANIFEST, error)) from None
    size = sum(entry["bytes"] for entry in entries)
    say(f"{folder}: {len(entries)} files, {spell_bytes(size)} ({size:,} bytes); give it as `mirror` in the config")
    return folder / MANIFEST


def spell_bytes(n: float) -> str:
    """A size for readers.

    >>> spell_bytes(2_640_000_000)
    '2.6 GB'
    """
    units, step = ("bytes", "kB", "MB", "GB", "TB"), 0
    while n >= 1000 and step < len(units) - 1:
        n, step = n / 1000, step + 1
    return f"{n:.1f} {units[step]}" if step else f"{n:.0f} bytes"


# --- checks before anything is fetched ----------------------------------------------------------------------------


def _refuse_unpinned(needs: Needs) -> None:
    """Name all files without a hash at once."""
    files = [file for name, found in needs.files.items() if name not in needs.vouched for file in found]
    bare = dict.fromkeys(file.name for file in files if not (file.sha256 or file.md5 or file.member_sha256))
    if bare:
        listed = ", ".join(f"{name} ({needs.users[name][0]})" for name in bare)
        raise FetchError(
            f"no hash is pinned for {listed}; pin sha256 in the card, or set `allow_unpinned: true` (--allow-unpinned) "
            "to accept what comes and have its sha256 printed"
        )


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FetchError(
            f"mirror: {folder}: cannot be written ({error.strerror}); name a folder that can, with --dir"
        ) from None


def _refuse_other(needs: Needs, known: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """A file of another run must not be replaced by one that shares its name."""
    for name, (file, *_) in needs.files.items():
        if name in (MANIFEST, SUMS) or name.endswith(".part"):
            raise ConfigError(f"{needs.users[name][0]}: {name} is a name that the mirror uses itself; choose another")
        entry = known.get(name, {})
        for algorithm, pinned in (("sha256", file.sha256), ("md5", file.md5)):
            if pinned is not None and entry.get(algorithm, pinned) != pinned:
                users = ", ".join(entry.get("users", ["another run"]))
                raise ConfigError(
                    f"{folder / name}: another file of that name is there already, for {users}; choose another folder, "
                    "or delete it if it is outdated"
                )


def _check_room(needs: Needs, folder: Path) -> None:
    missing = 0
    for name, (file, *_) in needs.files.items():
        there = sum(path.stat().st_size for path in (folder / name, folder / f"{name}.part") if path.is_file())
        missing += max(0, (file.bytes or 0) - there)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FetchError(
            f"mirror: {folder}: {spell_bytes(missing)} are to come, but only {spell_bytes(free)} are free; name "
            "another folder with --dir"
        )


def _drop_damaged(folder: Path, name: str, entry: Mapping[str, Any] | None) -> None:
    """Hash what was collected before once more: files on disks and sticks change without a new date."""
    path, record = folder / name, read_record(folder, name)
    expected = record.hashes.get("sha256") if record is not None else None
    expected = entry.get("sha256") if entry is not None else expected
    if expected is not None and path.is_file() and hash_file(path) != expected:
        say(f"{path}: changed since it was collected; it is fetched anew")
        path.unlink()
        (folder / STATE / f"{name}.json").unlink(missing_ok=True)


# --- reading it ---------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a mirror's manifest; empty where there is none.

    Raises
    ------
    DataError
        If it is broken.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [dict(entry) for entry in entries if entry["name"] and entry["sha256"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a manifest of `perturbed mirror`; delete it and mirror again") from None


def find_made(mirror: str | Path, name: str) -> Path | None:
    """The file `name` that a mirror holds, checked against its manifest; None where there is none.

    Raises
    ------
    DataError
        If the file is not what was collected.
    """
    path = Path(mirror) / name
    if not path.is_file():
        return None
    expected = next((entry["sha256"] for entry in read_manifest(mirror) if entry["name"] == name), None)
    if expected is None:
        raise DataError(f"{path}: {MANIFEST} does not name it; run `perturbed mirror` to its end, and carry all of it")
    found = hash_file(path)
    if found != expected:
        raise DataError(f"{path}: sha256 {found}, collected was {expected}; carry the mirror over once more")
    return path


def copy_slice(card: CensusCard, name: str, out: str | Path, mirror: str | Path) -> bool:
    """Write the `cells.h5ad` of a query from a mirror, where it holds them.

    Parameters
    ----------
    card
        The card of the cells; only those of kind `query` are in mirrors as cells.
    name
        Its name.
    out
        The `cells.h5ad` to write, with the same bytes as a query writes.
    mirror
        The mirror.

    Returns
    -------
    bool
        Whether the cells were there; if not, the Census is to be asked.

    Raises
    ------
    DataError
        If the mirror's file is not what was collected, or not what the card expects.
    FetchError
        If there is no such mirror, or `out` cannot be written.
    """
    import anndata

    from perturbed.data.census.cells import check_expectations

    if not isinstance(card.cells, QueryCells):
        return False
    if not Path(mirror).is_dir():
        raise FetchError(f"mirror: {mirror}: no such folder; correct the path, or leave it out to download")
    found = find_made(mirror, slice_name(card.cells, name))
    if found is None:
        say(f"{name}: this query is not in the mirror {mirror}; the Census is asked")
        return False
    cells = anndata.read_h5ad(found, backed="r")
    check_expectations(card, cells.obs, cells.n_vars, name)
    cells.file.close()
    _copy_in(found, Path(out))
    return True
