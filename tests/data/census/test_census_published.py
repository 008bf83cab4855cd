"""The published Census, stood in for on this machine: an S3 server, the directory of releases, the real client."""

from __future__ import annotations

import functools
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
from census_world import BETA, VERSION, query_card

from perturbed.data.census import remote
from perturbed.data.census.query import query_cells
from perturbed.errors import ConfigError, FetchError

BUCKET = "cellxgene-census-public-us-west-2"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upload(store: Path, port: int) -> None:
    import boto3

    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-west-2"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
    for attempt in range(100):
        try:
            client.list_buckets()
            break
        except Exception:
            if attempt == 99:
                raise
            time.sleep(0.2)
    client.create_bucket(
        Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "us-west-2"}, ACL="public-read"
    )
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        key = f"cell-census/{VERSION}/soma/{file.relative_to(store)}"
        client.upload_file(str(file), BUCKET, key, ExtraArgs={"ACL": "public-read"})


def release_directory(folder: Path) -> None:
    uri = f"cell-census/{VERSION}/soma/"
    release = {
        "release_date": None,
        "release_build": VERSION,
        "soma": {"uri": f"s3://{BUCKET}/{uri}", "relative_uri": f"/{uri}", "s3_region": "us-west-2"},
        "h5ads": {"uri": f"s3://{BUCKET}/h5ads/", "relative_uri": "/h5ads/", "s3_region": "us-west-2"},
        "flags": {"lts": True},
    }
    mirror = {"provider": "S3", "base_uri": f"s3://{BUCKET}/", "region": "us-west-2"}
    (folder / "release.json").write_text(json.dumps({"stable": VERSION, "latest": VERSION, VERSION: release}))
    (folder / "mirrors.json").write_text(json.dumps({"default": "here", "here": mirror}))


@pytest.fixture(scope="module")
def published(store, tmp_path_factory):
    """The store as a release that the client finds by its date."""
    import cellxgene_census._open as opening
    import cellxgene_census._release_directory as directory

    folder, port = tmp_path_factory.mktemp("published"), free_port()
    release_directory(folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    call = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    log = open(folder / "moto.log", "w")  # noqa: SIM115
    s3 = subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{web.server_address[1]}"
    s3_config = {
        "vfs.s3.endpoint_override": f"127.0.0.1:{port}",
        "vfs.s3.scheme": "http",
        "vfs.s3.use_virtual_addressing": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", f"{here}/release.json")
        patch.setattr(directory, "CELL_CENSUS_MIRRORS_DIRECTORY_URL", f"{here}/mirrors.json")
        for key, value in s3_config.items():
            patch.setitem(opening.DEFAULT_TILEDB_CONFIGURATION, key, value)
        try:
            upload(store, port)
            yield patch, directory
        finally:
            web.shutdown()
            s3.terminate()
            s3.wait(10)
            log.close()


def test_a_release_is_found_by_its_date_and_streamed(published, islets, tmp_path):
    query_cells(query_card(obs_filter=[BETA]), "beta", tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    rows = np.flatnonzero((islets.obs["cell_type"] == BETA["values"]) & islets.obs["is_primary_data"])
    assert (islets.counts[rows] != found.X).nnz == 0 and len(rows) > 60
    assert json.loads(found.uns["provenance"])["uri"] == f"s3://{BUCKET}/cell-census/{VERSION}/soma/"


def test_an_unknown_release_lists_the_known_ones(published, tmp_path):
    with pytest.raises(ConfigError, match=rf"no release '2022-01-01'; known: {VERSION}$") as error:
        query_cells(query_card(census_version="2022-01-01"), "x", tmp_path / "cells.h5ad")
    assert "\n" not in str(error.value)


def test_a_census_that_cannot_be_reached_is_told(published, tmp_path, monkeypatch):
    _, directory = published
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(directory, "CELL_CENSUS_MIRRORS_DIRECTORY_URL", f"http://127.0.0.1:{free_port()}/mirrors.json")
    with pytest.raises(FetchError, match=r"x: Census 2023-12-15: .*\(2 attempts\); check the network") as error:
        query_cells(query_card(), "x", tmp_path / "cells.h5ad")
    assert "\n" not in str(error.value)
