"""A mirror holds every file that a run gets from elsewhere, checked, and says what is missing in one line."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from file_server import FileServer, serve_files
from perturbed.config import Section
from perturbed.data import download as transfer
from perturbed.data import mirror as mirroring
from perturbed.data.cards import Card, RemoteFile
from perturbed.data.census.query import query_cells
from perturbed.data.census.spec import CensusCard, ModelCard
from perturbed.data.fetch import fetch_file
from perturbed.data.mirror import collect, copy_slice, find_made, mirror_run, read_manifest, spell_bytes
from perturbed.data.needs import Made, Needs, cards_of, find_needs, made_name, walk
from perturbed.errors import ConfigError, DataError, FetchError, PerturbedError
from perturbed.files import write_text
from perturbed.pathways.spec import GeneSetCard
from perturbed.plan import Plan

ROOT = Path(__file__).parents[2]
BODY = np.random.default_rng(11).bytes(50_000)
OTHER = b"other content"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")
    with serve_files() as served:
        served.files |= {"file.bin": BODY, "other.bin": OTHER}
        yield served


def entry(server: FileServer, name: str, **other: Any) -> dict[str, Any]:
    content = server.files[name]
    return {"name": name, "urls": [server.url(name)], "sha256": sha(content), "bytes": len(content), **other}


def url_card(*files: dict[str, Any], **other: Any) -> Card:
    return Card.model_validate({"source": {"kind": "url", "files": list(files)}, **other})


def needs(*files: dict[str, Any]) -> Needs:
    return find_needs({"dataset a": url_card(*files)})


def fill(wanted: Needs, folder: Path, **other: Any) -> dict[str, dict[str, Any]]:
    collect(wanted, folder, progress=False, **other)
    return {found["name"]: found for found in read_manifest(folder)}


# --- what is needed -----------------------------------------------------------------------------------------------


class Inner(Section):
    file: RemoteFile


class NewCard(Section):
    """A kind of card that nobody thought of yet."""

    single: RemoteFile
    listed: tuple[Inner, ...]
    named: dict[str, Inner]


def test_files_of_any_card_are_found_wherever_they_stand() -> None:
    files = {name: {"name": name, "urls": "https://example.invalid/f", "sha256": "0" * 64} for name in "abcd"}
    listed = [{"file": files["b"]}, {"file": files["c"]}]
    card = NewCard.model_validate({"single": files["a"], "listed": listed, "named": {"x": {"file": files["d"]}}})
    assert [section.name for section in walk(card) if isinstance(section, RemoteFile)] == list("abcd")
    found = find_needs({"new card n": card})
    assert list(found.files) == list("abcd")
    assert found.users == {name: ["new card n"] for name in "abcd"}


def test_two_files_of_one_name_are_refused() -> None:
    one = url_card({"name": "file.bin", "urls": ["https://example.invalid/a"], "sha256": "1" * 64})
    two = url_card({"name": "file.bin", "urls": ["https://example.invalid/b"], "sha256": "0" * 64})
    with pytest.raises(ConfigError, match=r"dataset two: file\.bin is another file in dataset one; give one"):
        find_needs({"dataset one": one, "dataset two": two})
    bare = [url_card({"name": "file.bin", "urls": [f"https://example.invalid/{name}"]}) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="another file"):
        find_needs({"one": bare[0], "two": bare[1]})


def test_files_of_this_machine_are_named_and_not_collected() -> None:
    card = Card.model_validate({"source": {"kind": "path", "path": "x.h5ad"}, "files": {"gene_graph": "graph.csv"}})
    found = find_needs({"dataset c": card})
    assert found.local == {"x.h5ad": "dataset c", "graph.csv": "dataset c"}
    assert not found.files


def test_gene_sets_and_a_graph_that_a_card_names_are_collected() -> None:
    """By the library's card and by the address; neither is a file of this machine."""
    folders = {"cards": "datasets", "method_files": "methods", "gene_set_cards": "gene_sets"}
    config = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
    plan = Plan({**config, **{key: [str(ROOT / "config" / folder)] for key, folder in folders.items()}})
    found = find_needs(cards_of(plan))
    assert "gene-sets go_bp_human" in found.users["c5.go.bp.v2025.1.Hs.symbols.gmt"]
    assert "dataset norman2019_paper" in found.users["go_essential_all.tar.gz"]
    assert not found.local


def test_every_shipped_card_can_be_asked() -> None:
    """No two cards of the project share a file name for different files."""
    from perturbed.data.cards import load_card

    names = sorted(path.stem for path in (ROOT / "config/datasets").glob("*.yaml"))
    found = find_needs({name: load_card(name, [ROOT / "config/datasets"]) for name in names})
    # three members of one archive
    assert len(found.files["filtered_gene_bc_matrices_mex_irf8_fullAggr.zip"]) == 3
    assert len(found.files) >= 15


# --- filling ------------------------------------------------------------------------------------------------------


def test_a_mirror_serves_without_network(server: FileServer, tmp_path: Path) -> None:
    first = entry(server, "file.bin")
    second = {"name": "other.bin", "urls": [server.url("other.bin")], "md5": hashlib.md5(OTHER).hexdigest()}
    cards = {"dataset a": url_card(first), "dataset b": url_card(first, second)}
    entries = fill(find_needs(cards), tmp_path / "mirror")
    assert entries["file.bin"]["users"] == ["dataset a", "dataset b"]
    assert (entries["file.bin"]["sha256"], entries["file.bin"]["bytes"]) == (sha(BODY), len(BODY))
    assert entries["file.bin"]["origin"] == server.url("file.bin")
    assert entries["other.bin"]["sha256"] == sha(OTHER)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "mirror", capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "file.bin: OK\nother.bin: OK\n")
    assert sorted(server.requests) == ["file.bin", "other.bin"]
    lone = RemoteFile(name="file.bin", urls=("https://example.invalid/file.bin",), sha256=sha(BODY))
    found = fetch_file(lone, tmp_path / "data", mirror=tmp_path / "mirror", progress=False)
    assert found == tmp_path / "mirror/file.bin"
    assert found.read_bytes() == BODY


def test_a_second_call_downloads_nothing_and_changes_nothing(server: FileServer, tmp_path: Path) -> None:
    wanted = needs(entry(server, "file.bin"), entry(server, "other.bin"))
    fill(wanted, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    fill(wanted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == first
    assert len(server.requests) == 2


def test_half_a_download_is_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY[:20_000])
    fill(needs(entry(server, "file.bin")), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert not (tmp_path / "file.bin.part").exists()


def test_a_failure_leaves_no_manifest_and_the_next_call_ends_it(server: FileServer, tmp_path: Path) -> None:
    wanted = needs(entry(server, "file.bin"), entry(server, "other.bin"))
    del server.files["other.bin"]
    with pytest.raises(FetchError, match=r"other\.bin: no source gave the file.*HTTP 404"):
        fill(wanted, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    server.files["other.bin"] = OTHER
    server.requests.clear()
    assert set(fill(wanted, tmp_path)) == {"file.bin", "other.bin"}
    assert server.requests == ["other.bin"]


def test_bytes_that_changed_without_a_new_date_are_fetched_anew(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    wanted = needs(entry(server, "file.bin"))
    fill(wanted, tmp_path)
    path = tmp_path / "file.bin"
    stat = path.stat()
    path.write_bytes(bytes([BODY[0] ^ 1]) + BODY[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fill(wanted, tmp_path)
    assert path.read_bytes() == BODY
    assert "changed since it was collected" in capsys.readouterr().err


def test_a_second_run_adds_to_the_mirror_of_the_first(server: FileServer, tmp_path: Path) -> None:
    fill(needs(entry(server, "file.bin")), tmp_path)
    both = fill(find_needs({"dataset b": url_card(entry(server, "file.bin"), entry(server, "other.bin"))}), tmp_path)
    assert both["file.bin"]["users"] == ["dataset a", "dataset b"]
    assert both["other.bin"]["users"] == ["dataset b"]
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 2


def test_the_file_of_another_run_is_not_replaced(server: FileServer, tmp_path: Path) -> None:
    fill(needs(entry(server, "file.bin")), tmp_path)
    other = needs(entry(server, "file.bin", sha256=sha(OTHER), bytes=None))
    with pytest.raises(ConfigError, match=r"file\.bin: another file of that name is there already, for dataset a"):
        fill(other, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "file.bin.part"])
def test_names_that_the_mirror_uses_itself_are_refused(name: str, server: FileServer, tmp_path: Path) -> None:
    server.files[name] = OTHER
    with pytest.raises(ConfigError, match=f"dataset a: {name} is a name that the mirror uses itself"):
        fill(needs(entry(server, name)), tmp_path)
    assert server.requests == []


def test_what_this_machine_has_is_copied(server: FileServer, tmp_path: Path) -> None:
    near = tmp_path / "downloads"
    fetch_file(RemoteFile.model_validate(entry(server, "file.bin")), near, progress=False)
    (near / "other.bin").write_bytes(b"x" * len(OTHER))  # wrong content: not taken
    server.requests.clear()
    wanted = needs(entry(server, "file.bin"), entry(server, "other.bin"))
    entries = fill(wanted, tmp_path / "mirror", near=[tmp_path / "none", near])
    assert server.requests == ["other.bin"]
    assert entries["file.bin"]["origin"] == server.url("file.bin")
    assert (tmp_path / "mirror/other.bin").read_bytes() == OTHER
    assert (near / "other.bin").read_bytes() == b"x" * len(OTHER)


def test_an_archive_is_checked_for_every_member_that_is_wanted(server: FileServer, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.bin", BODY)
        archive.writestr("b.bin", OTHER)
    server.files["x.zip"] = buffer.getvalue()
    members = [("a.bin", BODY), ("b.bin", OTHER)]
    entries = [entry(server, "x.zip", sha256=None, member=name, member_sha256=sha(body)) for name, body in members]
    assert set(fill(needs(*entries), tmp_path)) == {"x.zip"}
    assert server.requests == ["x.zip"]
    for file, (_, body) in zip(needs(*entries).files["x.zip"], members, strict=True):
        lone = file.model_copy(update={"urls": ("https://example.invalid/x.zip",)})
        assert fetch_file(lone, tmp_path / "data", mirror=tmp_path, progress=False).read_bytes() == body
    wrong = {**entries[1], "member_sha256": sha(BODY)}
    with pytest.raises(FetchError, match=r"x\.zip: no source gave the file.*member sha256"):
        fill(needs(entries[0], wrong), tmp_path / "other")


# --- one clear error each -----------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[PerturbedError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_files_without_a_hash_are_named_before_any_request(server: FileServer, tmp_path: Path) -> None:
    wanted = needs(entry(server, "file.bin", sha256=None), entry(server, "other.bin", sha256=None))
    with pytest.raises(FetchError, match=r"no hash is pinned for file\.bin \(dataset a\), other\.bin") as error:
        fill(wanted, tmp_path / "mirror")
    assert "allow_unpinned" in one_line(error)
    assert server.requests == []
    assert not (tmp_path / "mirror").exists()
    assert fill(wanted, tmp_path / "mirror", allow_unpinned=True)["file.bin"]["sha256"] == sha(BODY)


def test_a_folder_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("a file, no folder")
    with pytest.raises(FetchError, match=r"mirror: .*mirror: cannot be written \(.*--dir") as error:
        fill(needs(entry(server, "file.bin")), tmp_path / "mirror")
    one_line(error)
    assert server.requests == []


def test_too_little_room_is_said_before_any_request(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 30_000))
    with pytest.raises(FetchError, match=r"50\.0 kB are to come, but only 30\.0 kB are free") as error:
        fill(needs(entry(server, "file.bin")), tmp_path)
    one_line(error)
    assert server.requests == []
    (tmp_path / "file.bin.part").write_bytes(BODY[:25_000])  # the half that is there needs no room
    fill(needs(entry(server, "file.bin")), tmp_path)


def test_a_broken_manifest_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": 1}')
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        fill(needs(entry(server, "file.bin")), tmp_path)


def test_sizes_are_spelt() -> None:
    assert [spell_bytes(n) for n in (0, 999, 1000, 2_640_000_000, 7e15)] == [
        "0 bytes", "999 bytes", "1.0 kB", "2.6 GB", "7000.0 TB",
    ]  # fmt: skip


# --- files that are made ------------------------------------------------------------------------------------------


class Question(Section):
    asked: str
    where: str | None = None


def made(question: Question, log: list[str]) -> Made:
    def make(path: Path) -> None:
        log.append(question.asked)
        write_text(path, f"answer to {question.asked}")

    return Made(made_name("answer", question, "where"), make, origin="a service")


def test_an_answer_is_asked_for_once_and_known_by_its_question(tmp_path: Path) -> None:
    log: list[str] = []
    wanted, same, other = (
        made(Question(**q), log) for q in ({"asked": "x"}, {"asked": "x", "where": "y"}, {"asked": "z"})
    )
    assert wanted.name == same.name != other.name
    for _ in range(2):
        found = Needs()
        found.add("census cells c", wanted)
        entries = fill(found, tmp_path / "mirror")
    assert log == ["x"]
    assert entries[wanted.name]["origin"] == "a service"
    assert find_made(tmp_path / "mirror", wanted.name) == tmp_path / "mirror" / wanted.name
    assert find_made(tmp_path / "mirror", other.name) is None
    copied = Needs()
    copied.add("census cells c", wanted)
    fill(copied, tmp_path / "second", near=[tmp_path / "mirror"])
    assert log == ["x"]


def test_an_answer_that_changed_or_was_never_finished_is_refused(tmp_path: Path) -> None:
    answer = made(Question(asked="x"), [])
    wanted = Needs()
    wanted.add("c", answer)
    fill(wanted, tmp_path)
    (tmp_path / answer.name).write_text("another answer")
    with pytest.raises(DataError, match=r"sha256 .*collected was .*carry the mirror over once more"):
        find_made(tmp_path, answer.name)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json does not name it"):
        find_made(tmp_path, answer.name)


# --- cells of the Census ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store in the layout of the Census."""
    from perturbed.data.census.simulate import write_simulation
    from perturbed.data.census.spec import SimulationCells

    folder = tmp_path_factory.mktemp("census")
    params = {"n_cells": 300, "n_genes": 300, "n_donors": 2, "n_up": 10, "n_down": 10}
    cells = SimulationCells.model_validate({"kind": "simulation", "params": params})
    write_simulation(cells, "small", folder / "store", folder / "truth.csv", folder / "sets.gmt")
    return folder / "store"


def census_card(uri: str | None, **expect: Any) -> CensusCard:
    cells = {"kind": "query", "organism": "mus_musculus", "census_version": "2023-12-15", "uri": uri}
    cells |= {"obs_filter": [{"column": "disease", "values": ["normal"]}]}
    return CensusCard.model_validate({"cells": cells, "expect": expect})


def test_cells_of_the_census_are_asked_for_once_and_found_without_it(store: Path, tmp_path: Path) -> None:
    """With the bytes that the query itself writes; wherever the store lay, the question is the same."""
    entries = fill(find_needs({"census small": census_card(str(store))}), tmp_path / "mirror")
    (name,) = entries
    assert re.fullmatch(r"census-small-[0-9a-f]{16}\.h5ad", name)
    assert entries[name]["origin"] == "Census 2023-12-15"
    query_cells(census_card(str(store)), "small", tmp_path / "direct.h5ad")
    anywhere = census_card(None)  # the published release, which is never asked here
    assert copy_slice(anywhere, "small", tmp_path / "cells.h5ad", tmp_path / "mirror")
    assert (tmp_path / "cells.h5ad").read_bytes() == (tmp_path / "direct.h5ad").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "direct.h5ad", "mirror"]

    with pytest.raises(DataError, match="n_obs"):
        copy_slice(census_card(None, n_obs=1), "small", tmp_path / "other.h5ad", tmp_path / "mirror")
    assert not copy_slice(anywhere, "another", tmp_path / "other.h5ad", tmp_path / "mirror")
    with pytest.raises(FetchError, match="no such folder"):
        copy_slice(anywhere, "small", tmp_path / "other.h5ad", tmp_path / "none")
    assert not (tmp_path / "other.h5ad").exists()


def test_models_and_gene_sets_are_collected_like_data(server: FileServer, tmp_path: Path) -> None:
    """With the tables that translate ids; a library that is pinned by its content needs no hash of its bytes."""
    server.files |= {"model.pt": b"weights", "sets.gmt": b"A\t\tx\n", "map.tsv": b"1\tx\n"}
    model = {"kind": "published", "organism": "mus_musculus", "census_version": "2023-12-15"}
    cards: dict[str, Section] = {
        "model m": ModelCard.model_validate({"model": {**model, "file": entry(server, "model.pt")}}),
        "gene-sets g": GeneSetCard.model_validate({
            "source": {"kind": "url", "file": entry(server, "sets.gmt", sha256=None)}, "sorted_sha256": "0" * 64,
            "ids": "entrez", "organism": "mouse",
            "map": {"source": {"kind": "url", "file": entry(server, "map.tsv")}},
            "orthologs": {"source": {"kind": "path", "path": "orthologs.tsv"}},
        }),
        "model s": ModelCard.model_validate({"model": {"kind": "path", "folder": "saved"}}),
    }  # fmt: skip
    needs = find_needs(cards)
    assert needs.local == {"orthologs.tsv": "gene-sets g", "saved": "model s"}
    entries = fill(needs, tmp_path)
    assert {name: found["users"] for name, found in entries.items()} == {
        "model.pt": ["model m"], "sets.gmt": ["gene-sets g"], "map.tsv": ["gene-sets g"],
    }  # fmt: skip


# --- a run --------------------------------------------------------------------------------------------------------


def test_a_run_is_collected_with_what_its_config_says(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`allow_unpinned` and a mirror folder of the config count; a mirror that is not on this machine is no error."""
    monkeypatch.chdir(ROOT)
    cards = tmp_path / "cards"
    cards.mkdir()
    card = {
        "source": {"kind": "url", "files": [entry(server, "file.bin", sha256=None)]},
        "files": {"gene_graph": "graph.csv"},
    }
    (cards / "web.yaml").write_text(yaml.safe_dump(card))
    config = {
        "dataset": ["web", "tiny"],
        "cards": [str(cards), "tests/configs/cards"],
        "methods": ["no_change", "mean_effect"],
    }
    config |= {
        "statistics": {"primary_method": "mean_effect", "primary_baseline": "no_change", "baselines": ["no_change"]}
    }
    config |= {"data": str(tmp_path / "data"), "mirror": "/nowhere/at/all"}
    with pytest.raises(FetchError, match="no hash is pinned"):
        mirror_run(Plan(config), tmp_path / "mirror", progress=False)
    manifest = mirror_run(Plan({**config, "allow_unpinned": True}), tmp_path / "mirror", progress=False)
    assert [found["name"] for found in json.loads(manifest.read_text())] == ["file.bin"]
    said = capsys.readouterr().err
    assert "1 of 1: file.bin, for dataset web" in said
    assert "1 files, 50.0 kB (50,000 bytes)" in said
    assert "graph.csv (dataset web) is a file of this machine" in said
