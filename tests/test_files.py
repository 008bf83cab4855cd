"""Files are whole or absent, and nothing existing is lost."""

from __future__ import annotations

import errno
import io

import pytest

from perturbed.files import atomic, hash_file, write_json, write_text


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_old_file_and_no_part(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == ["a.txt"]


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "model") as part:
        part.mkdir()
        (part / "state.pt").write_bytes(b"x")
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "a.json"

    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: FullDisk())
    with pytest.raises(OSError, match="No space left"):
        write_json(target, {"a": 1})
    monkeypatch.undo()
    assert leftovers(tmp_path) == []


def test_a_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "model"
    for text in ("one", "two"):
        with atomic(target) as part:
            part.mkdir()
            (part / f"{text}.txt").write_text(text)
    assert leftovers(target) == ["two.txt"]
    assert leftovers(tmp_path) == ["model"]


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with atomic(tmp_path / "x.h5ad") as part:
        assert part.suffix == ".h5ad"
        part.write_text("")


def test_hash_is_the_files(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
