"""Members come out whole and checked; archives that lie, link or explode are refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perturbed.data.archives import FREE_BYTES, extract_member, hash_member
from perturbed.errors import DataError

CONTENT = np.random.default_rng(3).bytes(200_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


def make_zip(path: Path, member: str, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other.txt", "other")
        archive.writestr(member, content)
    return path


def make_tar(path: Path, member: str, content: bytes = CONTENT) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in (("other.txt", b"other"), (member, content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_gzip(path: Path, member: str, content: bytes = CONTENT) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


MAKERS = [(make_zip, "x.zip"), (make_tar, "x.tar"), (make_tar, "x.tar.gz"), (make_gzip, "x.gz")]


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_member_comes_out_whole(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, "a/b.h5ad")
    target = extract_member(archive, "a/b.h5ad", tmp_path / "out" / "b", sha256=SHA)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert hash_member(archive, "a/b.h5ad") == SHA


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_wrong_hash_leaves_nothing(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, "b")
    with pytest.raises(DataError, match=f"member 'b' has sha256 {SHA}, not 0000"):
        extract_member(archive, "b", tmp_path / "out" / "b", sha256="0" * 64)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("member", ["../b", "/etc/passwd", "a/../../b", "C:\\b", "..\\b", ""])
@pytest.mark.parametrize(("make", "name"), MAKERS[:3])
def test_names_that_lead_out_are_refused(make: Callable[..., Path], name: str, member: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, member or "x")
    with pytest.raises(DataError, match="leads out of the archive"):
        extract_member(archive, member, tmp_path / "out" / "b")


@pytest.mark.parametrize(("make", "name"), MAKERS[:3])
def test_missing_member_names_the_nearest(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, "norman/perturb_processed.h5ad")
    with pytest.raises(DataError, match=r"did you mean 'norman/perturb_processed\.h5ad'"):
        extract_member(archive, "norman/perturb_procesed.h5ad", tmp_path / "b")


def test_links_are_refused(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as archive:
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    packed = tmp_path / "x.zip"
    with zipfile.ZipFile(packed, "w") as archive_zip:
        link = zipfile.ZipInfo("soft")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive_zip.writestr(link, "/etc/passwd")
        archive_zip.writestr("folder/", "")
    for path, member in ((tar, "soft"), (tar, "hard"), (tar, "folder"), (packed, "soft"), (packed, "folder/")):
        with pytest.raises(DataError, match="no regular file"):
            extract_member(path, member, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("make", "name"), [MAKERS[0], *MAKERS[2:]])
def test_bombs_are_stopped(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, "b", bytes(FREE_BYTES + 4 * 2**20))
    assert archive.stat().st_size < 50_000
    with pytest.raises(DataError, match=f"unpacks to more than {FREE_BYTES:,} bytes.*bomb"):
        extract_member(archive, "b", tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []
    assert extract_member(archive, "b", tmp_path / "b", max_ratio=2000).stat().st_size == FREE_BYTES + 4 * 2**20


def test_size_limit(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", "b")
    with pytest.raises(DataError, match="more than 100,000 bytes"):
        extract_member(archive, "b", tmp_path / "b", max_bytes=100_000)
    assert extract_member(archive, "b", tmp_path / "b", max_bytes=200_000).exists()


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_truncated_archive(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, "b")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=r"broken archive|neither zip, tar nor gzip") as error:
        extract_member(archive, "b", tmp_path / "out" / "b")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "b").exists()


def test_changed_byte_is_noticed_without_a_hash(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", "b")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match="broken archive"):
        extract_member(archive, "b", tmp_path / "b")


def test_repeated_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("b", "one")
        archive.writestr("b", "two")
    with pytest.raises(DataError, match="occurs 2 times"):
        extract_member(tmp_path / "x.zip", "b", tmp_path / "b")


def test_error_page_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("<html>Forbidden</html>")
    with pytest.raises(DataError, match="neither zip, tar nor gzip"):
        extract_member(tmp_path / "x.zip", "b", tmp_path / "b")
    with pytest.raises(DataError, match="no such archive"):
        extract_member(tmp_path / "none.zip", "b", tmp_path / "b")
