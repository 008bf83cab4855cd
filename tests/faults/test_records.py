"""Records beside outputs: what they know of sizes, and that they never stand in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from perturbed.errors import DataError
from perturbed.provenance import check_whole, record_path, recorded


def made(path: Path, text: str = "a,b\n1,2\n") -> Path:
    with recorded("test", path, {}, {}):
        path.write_text(text)
    return path


def test_a_file_changed_on_purpose_is_read_without_its_record(tmp_path: Path):
    file = made(tmp_path / "table.csv")
    check_whole(file)
    file.write_text("a,b\n")
    with pytest.raises(
        DataError, match=r"table\.csv: has 4 bytes, but had 8 .* delete table\.csv and rerun .*record|json"
    ):
        check_whole(file)
    record_path(file).unlink()
    check_whole(file)


def test_a_file_of_a_recorded_folder_is_known_by_itself(tmp_path: Path):
    folder = tmp_path / "tables"
    with recorded("test", folder, {}, {}):
        folder.mkdir()
        (folder / "one.csv").write_text("12")
        (folder / "two.csv").write_text("34")
    check_whole(folder, folder / "one.csv")
    (folder / "one.csv").write_text("")
    for path in (folder, folder / "one.csv"):
        with pytest.raises(DataError, match=r"one\.csv: has 0 bytes.*delete tables and rerun"):
            check_whole(path)
    check_whole(folder / "two.csv")
    (folder / "one.csv").unlink()
    with pytest.raises(DataError, match=r"one\.csv: is missing"):
        check_whole(folder)


def test_files_of_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with recorded("test", tmp_path / "tables", {}, {}):
        (tmp_path / "tables").mkdir()
        (tmp_path / "tables/one.csv").write_text("12")
    monkeypatch.chdir(tmp_path / "tables")
    check_whole("one.csv", ".", "absent.csv", "/", "/absent")
    Path("one.csv").write_text("1")
    for path in ("one.csv", "."):
        with pytest.raises(DataError, match=r"one\.csv: has 1 bytes.*delete tables"):
            check_whole(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"output": 3}', '{"output": {}}'])
def test_a_broken_record_is_passed_over(text: str, tmp_path: Path):
    file = made(tmp_path / "table.csv")
    record_path(file).write_text(text)
    check_whole(file)
    made(tmp_path / "next.csv")
    with recorded("test", tmp_path / "last.csv", {"table": file}, {}):
        (tmp_path / "last.csv").write_text("")
    record = json.loads(record_path(tmp_path / "last.csv").read_text())
    assert len(record["inputs"]["table"]["sha256"]) == 64


def test_a_failure_brings_the_record_back_and_a_kill_leaves_none(tmp_path: Path):
    file = made(tmp_path / "table.csv")
    before = record_path(file).read_bytes()
    with pytest.raises(RuntimeError), recorded("test", file, {}, {}):
        assert not record_path(file).exists()
        raise RuntimeError
    assert record_path(file).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.csv.provenance.json"]


def test_what_is_written_beside_has_a_record_of_its_own(tmp_path: Path):
    with recorded("test", tmp_path / "a", {}, {}, beside=[tmp_path / "b", tmp_path / "absent", None]):
        (tmp_path / "a").write_text("1")
        (tmp_path / "b").write_text("23")
    assert json.loads(record_path(tmp_path / "b").read_text())["output"]["bytes"] == 2
    assert not record_path(tmp_path / "absent").exists()


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file of a folder, then the name, then the folder that holds the name."""
    from perturbed.files import atomic

    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic(tmp_path / "model") as part:
        part.mkdir()
        (part / "state.pt").write_text("x")
    assert events.index("state.pt") < events.index("-> model") < events.index(tmp_path.name)
