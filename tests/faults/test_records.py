"""Records beside outputs: what they know of sizes, and that they never stand in the way."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from perturbed.errors import DataError
from perturbed.provenance import DRAWN, check_whole, date_back, record_path, recorded, set_aside_torn


def made(path: Path, text: str = "a,b\n1,2\n") -> Path:
    path.parent.mkdir(exist_ok=True)
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


def test_what_is_torn_gets_another_name_and_nothing_else(tmp_path: Path):
    whole, torn, figure = made(tmp_path / "deep/whole.csv"), made(tmp_path / "torn.csv"), tmp_path / "figures/one"
    folder, gone = tmp_path / "tables", made(tmp_path / "gone.csv")
    with recorded("test", folder, {}, {}):
        folder.mkdir()
        (folder / "one.csv").write_text("12")
    with recorded("test", figure, {}, {}):
        figure.parent.mkdir()
        for kind in DRAWN:
            figure.with_suffix(kind).write_text(kind)
    assert set_aside_torn(tmp_path) == []
    torn.write_text("")
    gone.unlink()
    (folder / "one.csv").write_text("1")
    figure.with_suffix(".png").write_text("")
    before = sorted(tmp_path.rglob("*"))
    said = set_aside_torn(tmp_path, tmp_path / "absent", only_say=True)
    assert len(said) == 3 and all("no dry run" in line for line in said) and sorted(tmp_path.rglob("*")) == before
    said = set_aside_torn(tmp_path)
    assert len(said) == 3 and all("\n" not in line for line in said)
    assert f"{torn}: has 0 bytes, but had 8 when it was made; kept as torn.csv.torn" in "\n".join(said)
    assert not torn.exists() and not folder.exists() and not figure.with_suffix(".png").exists()
    assert (tmp_path / "tables.torn/one.csv").read_text() == "1" and whole.exists()
    assert figure.with_suffix(".svg").read_text() == ".svg"
    assert set_aside_torn(tmp_path) == [], "what is set aside is no output any more"
    made(torn).write_text("again")
    assert "kept as torn.csv.torn1" in set_aside_torn(tmp_path)[0]
    assert (tmp_path / "torn.csv.torn").read_text() == "" and (tmp_path / "torn.csv.torn1").read_text() == "again"


def test_links_between_folders_end(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/back").symlink_to(tmp_path)
    (tmp_path / "data/broken").symlink_to(tmp_path / "absent")
    made(tmp_path / "data/table.csv").write_text("")
    assert len(set_aside_torn(tmp_path)) == 1


def test_what_is_dated_in_the_future_is_dated_as_of_now(tmp_path: Path):
    ahead, model = made(tmp_path / "ahead.csv"), tmp_path / "model"
    with recorded("test", model, {}, {}):
        model.mkdir()
        (model / "state").write_text("1")
    (model / ".snakemake_timestamp").touch()
    assert date_back(tmp_path) == []
    then = time.time() + 1000
    for path in (ahead, model / ".snakemake_timestamp"):
        os.utime(path, (then, then))
    said = date_back(tmp_path, only_say=True)
    assert len(said) == 1 and "2 outputs in all; check the clocks" in said[0] and ahead.stat().st_mtime == then
    assert len(date_back(tmp_path)) == 1
    assert ahead.stat().st_mtime == (model / ".snakemake_timestamp").stat().st_mtime <= time.time()
    assert date_back(tmp_path) == []
