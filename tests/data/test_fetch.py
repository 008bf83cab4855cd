"""Downloads against a local server that misbehaves in every way seen in the wild."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbed.data import download as transfer
from perturbed.data import fetch as fetching
from perturbed.data.cards import Card, RemoteFile
from perturbed.data.fetch import fetch, fetch_file
from perturbed.errors import ConfigError, DataError, FetchError

BODY = np.random.default_rng(7).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
HALF = len(BODY) // 2


# --- the server ---------------------------------------------------------------------------------------------------


@dataclass
class Log:
    """What was asked of the server, and what it sent."""

    requests: list[tuple[str, str | None]] = field(default_factory=list)
    sent: int = 0
    agents: set[str] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    log: Log
    bodies: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self.log.requests.append((self.path, self.headers.get("Range")))
        self.log.agents.add(self.headers.get("User-Agent", ""))
        name = self.path.strip("/").split("/")[0]
        getattr(self, f"serve_{name}")()

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.log.sent += len(body)

    def body(self) -> bytes:
        return self.bodies.get(self.path, BODY)

    def range_start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def serve_good(self) -> None:
        start, body = self.range_start(), self.body()
        if start >= len(body):
            self.send(416, b"")
        elif start:
            self.send(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send(200, body)

    def serve_challenge(self) -> None:
        self.send(202, b"", x_amzn_waf_action="challenge")

    def serve_empty(self) -> None:
        self.send(200, b"")

    def serve_silent(self) -> None:
        """200 without a length and without a body."""
        self.send_response(200)
        self.end_headers()

    def serve_forbidden(self) -> None:
        self.send(403, b"no")

    def serve_short(self) -> None:
        self.send(200, BODY[:-1])

    def serve_long(self) -> None:
        """More than expected, and no length that would give it away."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY + b"more")

    def serve_wrong(self) -> None:
        self.send(200, b"x" * len(BODY))

    def serve_norange(self) -> None:
        self.send(200, BODY)

    def serve_oddrange(self) -> None:
        """Answers a range with another one."""
        if self.range_start():
            self.send(206, BODY, Content_Range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
        else:
            self.send(200, BODY)

    def serve_drop(self) -> None:
        """The first request gets half of the file; ranges are served."""
        if self.range_start():
            self.serve_good()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:HALF])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def serve_broken(self) -> None:
        """Never more than the first half."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:HALF])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def serve_stall(self) -> None:
        """Stops in the middle for longer than a client should wait."""
        if self.range_start():
            self.serve_good()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:HALF])
        self.wfile.flush()
        time.sleep(1.0)

    def serve_slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        for start in range(0, len(BODY), 50_000):
            self.wfile.write(BODY[start : start + 50_000])
            self.wfile.flush()
            time.sleep(0.02)

    def serve_busy(self) -> None:
        """Too busy once."""
        if len(self.log.requests) == 1:
            self.send(503, b"")
        else:
            self.serve_good()

    def serve_redirect(self) -> None:
        self.send(302, b"", Location="/good/file.bin")

    def serve_loop(self) -> None:
        self.send(302, b"", Location=self.path)

    def serve_away(self) -> None:
        self.send(302, b"", Location="http://example.com/file.bin")

    def serve_labelled(self) -> None:
        """A file of compressed bytes that the server calls a compressed page."""
        self.send(200, BODY, Content_Encoding="gzip")


@dataclass
class Server:
    address: str
    log: Log
    bodies: dict[str, bytes]

    def url(self, kind: str) -> str:
        return f"{self.address}/{kind}/file.bin"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    log, bodies = Log(), {}
    handler = type("Bound", (Handler,), {"log": log, "bodies": bodies})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Server(f"http://127.0.0.1:{http.server_address[1]}", log, bodies)
    http.shutdown()
    thread.join()
    http.server_close()


def remote(*urls: str, **other: Any) -> RemoteFile:
    return RemoteFile(name="file.bin", urls=urls, **{"sha256": SHA, "bytes": len(BODY), **other})


def get(file: RemoteFile, folder: Path, **other: Any) -> Path:
    return fetch_file(file, folder, **{"allow_insecure": True, "progress": False, **other})


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# --- one address --------------------------------------------------------------------------------------------------


def test_good_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    file = remote(server.url("good"))
    path = get(file, tmp_path)
    assert path == tmp_path / "file.bin"
    assert path.read_bytes() == BODY
    assert get(file, tmp_path) == path
    assert server.log.requests == [("/good/file.bin", None)]
    assert left_over(tmp_path) == {"file.bin"}
    assert all(agent.startswith("perturbed/") for agent in server.log.agents)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("challenge", "HTTP 202 with an empty body"),
        ("empty", "empty body"),
        ("silent", "empty body"),
        ("forbidden", "HTTP 403"),
        ("short", "299,999 bytes, expected 300,000"),
        ("long", "more than the expected 300,000 bytes"),
        ("wrong", "sha256"),
        ("loop", "more than 10 redirects"),
        ("away", "only https addresses are accepted, not http://example.com"),
    ],
)
def test_failure_goes_on_to_next_address(kind: str, reason: str, server: Server, tmp_path: Path) -> None:
    bad, good = server.url(kind), server.url("good")
    with pytest.raises(FetchError) as error:
        get(remote(bad), tmp_path)
    assert f"{bad}: " in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "file.bin").exists()
    assert get(remote(bad, good), tmp_path).read_bytes() == BODY


def test_all_reasons_in_one_line(server: Server, tmp_path: Path) -> None:
    kinds = ("challenge", "forbidden", "wrong", "short")
    with pytest.raises(FetchError) as error:
        get(remote(*map(server.url, kinds)), tmp_path)
    text = str(error.value)
    assert text.count("\n") == 0
    positions = [text.index(server.url(kind)) for kind in kinds]
    assert positions == sorted(positions)


def test_dropped_connection_goes_on_by_range(server: Server, tmp_path: Path) -> None:
    assert get(remote(server.url("drop")), tmp_path).read_bytes() == BODY
    assert server.log.requests[0] == ("/drop/file.bin", None)
    _, wanted = server.log.requests[1]
    assert wanted is not None
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= HALF
    assert server.log.sent == len(BODY) - start  # the second answer, counted alone, is the rest only


def test_stalled_connection_goes_on_by_range(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", (1.0, 0.2))
    monkeypatch.setattr(transfer, "CHUNK", 10_000)
    assert get(remote(server.url("stall")), tmp_path).read_bytes() == BODY
    assert [wanted is None for _, wanted in server.log.requests] == [True, False]


def test_part_of_an_earlier_run_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])
    assert get(remote(server.url("good")), tmp_path).read_bytes() == BODY
    assert server.log.requests == [("/good/file.bin", "bytes=1000-")]
    assert server.log.sent == len(BODY) - 1000


def test_complete_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY)
    assert get(remote(server.url("good")), tmp_path).read_bytes() == BODY
    assert server.log.requests == []


@pytest.mark.parametrize("kind", ["norange", "oddrange"])
def test_server_that_ignores_the_range_restarts(kind: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])
    assert get(remote(server.url(kind)), tmp_path).read_bytes() == BODY
    assert server.log.requests[0][1] == "bytes=1000-"


def test_part_with_wrong_beginning_is_dropped_and_fetched_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"y" * 1000)
    assert get(remote(server.url("good")), tmp_path).read_bytes() == BODY
    assert [wanted for _, wanted in server.log.requests] == ["bytes=1000-", None]


def test_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    assert get(remote(server.url("good")), tmp_path).read_bytes() == BODY
    (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    assert get(remote(server.url("good"), bytes=None), tmp_path).read_bytes() == BODY  # found by HTTP 416


def test_gives_up_without_progress(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=re.escape(server.url("broken"))):
        get(remote(server.url("broken")), tmp_path)
    assert len(server.log.requests) <= 2 + transfer.RETRIES
    assert (tmp_path / "file.bin.part").stat().st_size == HALF  # for the next run, or the next address


def test_refused_connection_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file.bin"
        with pytest.raises(FetchError, match="refused") as error:
            get(remote(url), tmp_path)
    assert "\n" not in str(error.value)


def test_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    assert get(remote(server.url("busy")), tmp_path).read_bytes() == BODY
    assert len(server.log.requests) == 2


def test_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    assert get(remote(server.url("redirect")), tmp_path).read_bytes() == BODY


def test_slow_server_is_waited_for(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(remote(server.url("slow")), tmp_path, progress=True).read_bytes() == BODY
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "file.bin" in captured.err
    assert "300k" in captured.err


def test_bytes_stay_as_they_are_on_the_wire(server: Server, tmp_path: Path) -> None:
    assert get(remote(server.url("labelled")), tmp_path).read_bytes() == BODY


# --- hashes -------------------------------------------------------------------------------------------------------


def test_md5_where_no_sha256_is_known(server: Server, tmp_path: Path) -> None:
    md5 = hashlib.md5(BODY).hexdigest()
    assert get(remote(server.url("good"), sha256=None, md5=md5), tmp_path).read_bytes() == BODY
    with pytest.raises(FetchError, match="md5"):
        get(remote(server.url("wrong"), sha256=None, md5=md5), tmp_path / "other")


def test_unpinned_is_refused_before_any_request(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"pins no hash.*allow_unpinned: true"):
        get(remote(server.url("good"), sha256=None), tmp_path)
    assert server.log.requests == []


def test_unpinned_prints_its_hash(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(remote(server.url("good"), sha256=None), tmp_path, allow_unpinned=True)
    assert f"sha256: {SHA}" in capsys.readouterr().err


def test_unpinned_part_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"y" * 1000)
    file = remote(server.url("good"), sha256=None, bytes=None)
    assert get(file, tmp_path, allow_unpinned=True).read_bytes() == BODY
    assert server.log.requests == [("/good/file.bin", None)]


def test_changed_file_is_noticed_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    file = remote(server.url("good"))
    path = get(file, tmp_path)
    path.write_bytes(b"z" * len(BODY))
    assert get(file, tmp_path).read_bytes() == BODY
    assert len(server.log.requests) == 2


def test_hash_is_not_computed_twice(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote(server.url("good"))
    get(file, tmp_path)

    def refuse(*_: Any) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(fetching, "hash_file", refuse)
    get(file, tmp_path)


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://example.com/f", "ftp://example.com/f", "file:///etc/hosts", "example.com/f"])
def test_only_https_is_accepted(url: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="only https addresses are accepted"):
        get(remote(url), tmp_path, allow_insecure=False)


def test_insecure_means_this_machine_only(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="only https"):
        get(remote("http://example.com/f"), tmp_path)


def test_localhost_by_environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote(server.url("good"))
    with pytest.raises(FetchError, match="only https"):
        get(file, tmp_path, allow_insecure=False)
    monkeypatch.setenv(fetching.ALLOW_LOCALHOST, "1")
    assert get(file, tmp_path, allow_insecure=False).read_bytes() == BODY


def test_file_address(tmp_path: Path) -> None:
    source = tmp_path / "with space.bin"
    source.write_bytes(BODY)
    assert get(remote(source.as_uri()), tmp_path / "data").read_bytes() == BODY
    with pytest.raises(FetchError, match="no such file"):
        get(remote((tmp_path / "none").as_uri()), tmp_path / "other")


# --- mirror -------------------------------------------------------------------------------------------------------


def test_mirror_hit_is_used_in_place(server: Server, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "file.bin").write_bytes(BODY)
    assert get(remote(server.url("good")), tmp_path / "data", mirror=mirror) == mirror / "file.bin"
    assert server.log.requests == []
    assert left_over(mirror) == {"file.bin"}  # nothing is written there


def test_mirror_miss_downloads(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    assert get(remote(server.url("good")), tmp_path / "data", mirror=mirror) == tmp_path / "data" / "file.bin"
    assert "not in the mirror" in capsys.readouterr().err


def test_mirror_with_wrong_hash_is_said_and_left(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "file.bin").write_bytes(b"x" * len(BODY))
    assert get(remote(server.url("good")), tmp_path / "data", mirror=mirror) == tmp_path / "data" / "file.bin"
    said = capsys.readouterr().err
    assert str(mirror / "file.bin") in said
    assert f"expected {SHA}" in said
    assert (mirror / "file.bin").read_bytes() == b"x" * len(BODY)


def test_mirror_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"mirror: .*no such folder"):
        get(remote("https://example.invalid/f"), tmp_path, mirror=tmp_path / "none")


def url_card(*files: dict[str, Any], **other: Any) -> Card:
    return Card.model_validate({"source": {"kind": "url", "files": list(files)}, **other})


# --- disks and interrupts -----------------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file on a disk with room for 100,000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_full_disk_leaves_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False)
    monkeypatch.setattr(transfer, "CHUNK", 30_000)
    with pytest.raises(FetchError, match=r"file\.bin: no space left on the disk") as error:
        get(remote(server.url("good"), server.url("slow")), tmp_path)
    assert "\n" not in str(error.value)
    assert left_over(tmp_path) == set()
    assert len(server.log.requests) == 1  # another address would not mend it


def test_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, no folder")
    with pytest.raises(FetchError, match="cannot be written"):
        get(remote(server.url("good")), tmp_path / "data")


def test_interrupt_keeps_the_part(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = transfer._append

    def interrupted(handle: io.FileIO, chunk: bytes, part: Path) -> None:
        append(handle, chunk, part)
        if handle.tell() >= 100_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "CHUNK", 20_000)
    monkeypatch.setattr(transfer, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(remote(server.url("good")), tmp_path)
    assert left_over(tmp_path) == {"file.bin.part"}
    kept = (tmp_path / "file.bin.part").read_bytes()
    assert kept == BODY[: len(kept)]
    monkeypatch.setattr(transfer, "_append", append)
    assert get(remote(server.url("good")), tmp_path).read_bytes() == BODY
    assert server.log.requests[-1] == ("/good/file.bin", f"bytes={len(kept)}-")


def test_two_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    file = remote(server.url("slow"))
    threads = [threading.Thread(target=get, args=(file, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert len(server.log.requests) == 1


# --- archives -----------------------------------------------------------------------------------------------------


def zipped(member: str, content: bytes, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.comment = comment
    return buffer.getvalue()


def test_member_is_unpacked_and_checked(server: Server, tmp_path: Path) -> None:
    archive = zipped("a/b.bin", BODY)
    server.bodies["/good/x.zip"] = archive
    known = {"sha256": hashlib.sha256(archive).hexdigest(), "member": "a/b.bin"}
    file = RemoteFile(name="x.zip", urls=(f"{server.address}/good/x.zip",), member_sha256=SHA, **known)
    path = get(file, tmp_path)
    assert path.name == "x.b.bin"
    assert path.read_bytes() == BODY
    (tmp_path / "x.zip").unlink()  # no longer needed
    assert get(file, tmp_path) == path
    wrong = file.model_copy(update={"member_sha256": "0" * 64})
    with pytest.raises(DataError, match=r"member 'a/b\.bin' has sha256"):
        get(wrong, tmp_path / "other")


def test_archive_built_anew_is_known_by_its_member(server: Server, tmp_path: Path) -> None:
    server.bodies["/good/bad.zip"] = zipped("a/b.bin", BODY[::-1])
    server.bodies["/good/x.zip"] = zipped("a/b.bin", BODY, comment=b"made at noon")
    urls = tuple(f"{server.address}/{path}" for path in ("wrong/x", "good/bad.zip", "good/x.zip"))
    file = RemoteFile(name="x.zip", urls=urls, member="a/b.bin", member_sha256=SHA)
    assert get(file, tmp_path).read_bytes() == BODY
    with pytest.raises(FetchError, match=r"neither zip, tar nor gzip.*member sha256"):
        get(file.model_copy(update={"urls": urls[:2]}), tmp_path / "other")


# --- data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (6, 4)).astype(np.float32))
    obs = pd.DataFrame({"perturbation": list("aabbcc")}, index=[f"c{i}" for i in range(6)])
    adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(4)]))
    adata.uns["provenance"] = {"source": "a laboratory"}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_fetch_from_path(cells: Path, tmp_path: Path) -> None:
    card = Card.model_validate({"source": {"kind": "path", "path": str(cells)}, "expect": {"n_obs": 6, "n_vars": 4}})
    for name in ("one", "two"):
        fetch(card, "mine", tmp_path / name / "raw.h5ad", data_dir=tmp_path / "data")
    assert (tmp_path / "one/raw.h5ad").read_bytes() == (tmp_path / "two/raw.h5ad").read_bytes()
    raw, source = anndata.read_h5ad(tmp_path / "one/raw.h5ad"), anndata.read_h5ad(cells)
    assert (raw.X != source.X).nnz == 0
    pd.testing.assert_frame_equal(raw.obs, source.obs)
    pd.testing.assert_frame_equal(raw.var, source.var)
    assert raw.uns["source_provenance"] == {"source": "a laboratory"}
    assert json.loads(raw.uns["provenance"]) == {
        "dataset": "mine",
        "kind": "path",
        "files": [{"path": str(cells), "sha256": hashlib.sha256(cells.read_bytes()).hexdigest()}],
    }


def test_fetch_from_addresses(cells: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fetching.ALLOW_LOCALHOST, "1")
    content = cells.read_bytes()
    server.bodies["/good/cells.h5ad"] = content
    urls = [f"{server.address}/challenge/cells.h5ad", f"{server.address}/good/cells.h5ad"]
    digest = hashlib.sha256(content).hexdigest()
    card = url_card({"name": "cells.h5ad", "urls": urls, "sha256": digest, "bytes": len(content)})
    for name in ("one", "two"):
        fetch(card, "mine", tmp_path / name / "raw.h5ad", data_dir=tmp_path / "data")
    assert (tmp_path / "one/raw.h5ad").read_bytes() == (tmp_path / "two/raw.h5ad").read_bytes()
    (entry,) = json.loads(anndata.read_h5ad(tmp_path / "one/raw.h5ad").uns["provenance"])["files"]
    assert (entry["urls"], entry["origin"], entry["sha256"]) == (urls, urls[1], digest)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert len(server.log.requests) == 2


def test_fetch_refuses_simulated_data(tmp_path: Path) -> None:
    card = Card.model_validate({"source": {"kind": "simulation", "generator": "scm"}})
    with pytest.raises(ConfigError, match="perturbed simulate"):
        fetch(card, "mine", tmp_path / "raw.h5ad", data_dir=tmp_path)


@pytest.mark.parametrize(("path", "what"), [("none.h5ad", "no such file"), (".", "is a folder")])
def test_fetch_names_the_key_of_a_missing_path(
    path: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card = Card.model_validate({"source": {"kind": "path", "path": path}})
    with pytest.raises(DataError, match=rf"mine: source.path: .*{what}.*correct the path"):
        fetch(card, "mine", tmp_path / "raw.h5ad", data_dir=tmp_path)


def test_fetch_that_breaks_an_expectation_leaves_nothing(cells: Path, tmp_path: Path) -> None:
    expect = {"n_obs": 7, "values": "log1p"}
    card = Card.model_validate({"source": {"kind": "path", "path": str(cells)}, "expect": expect})
    with pytest.raises(DataError, match=r"n_obs is 6 but the card expects 7; values is counts but .* log1p") as error:
        fetch(card, "mine", tmp_path / "out" / "raw.h5ad", data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert left_over(tmp_path / "out") == set()


def test_fetch_onto_a_full_disk(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perturbed.data import raw

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(raw.shutil, "copyfile", full)
    card = Card.model_validate({"source": {"kind": "path", "path": str(cells)}})
    with pytest.raises(FetchError, match=r"raw.h5ad: no space left on the disk"):
        fetch(card, "mine", tmp_path / "out" / "raw.h5ad", data_dir=tmp_path)
    assert left_over(tmp_path / "out") == set()
