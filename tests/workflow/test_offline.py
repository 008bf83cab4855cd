"""Mirrored on a connected machine, a run needs no network: the real rules in a network namespace without a route."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from offline import cut_off
from pipeline import ROOT, Run

from file_server import FileServer, serve_files
from perturbed.data.cards import SimulationSource, load_card
from perturbed.data.simulate import write_simulation

pytestmark = pytest.mark.workflow

METHODS = ["no_change", "mean_effect", "additive"]
BENCHMARK = ("benchmark", "data/gzipped/prepared.h5ad", "results/figures/overview.svg")


@dataclass
class World:
    """A run whose cells were served by a machine that is gone now."""

    run: Run
    mirror: Path
    requests: list[str]

    def offline(self, *targets: str, check: bool = True, blocked: bool = False) -> str:
        command, variables = cut_off(self.run.command(*targets), self.run.folder, blocked=blocked)
        # Accepting addresses of this machine makes the lost network, and nothing else, the reason of a failure.
        env = self.run.environment({"PERTURBED_ALLOW_LOCALHOST": "1", **variables})
        done = subprocess.run(
            command, cwd=self.run.folder, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def collect(self) -> str:
        """What `perturbed mirror` says, on the connected machine."""
        call = [sys.executable, "-m", "perturbed.cli", "mirror", "--config", "config.yaml", "--dir", "mirror"]
        env = self.run.environment({"PERTURBED_ALLOW_LOCALHOST": "1"})
        done = subprocess.run(call, cwd=self.run.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def configure(self, **changes: Any) -> None:
        statistics = {"primary_method": "additive", "primary_baseline": "mean_effect", "baselines": ["no_change"]}
        self.run.configure(
            dataset=["zipped", "gzipped"], cards=["cards"], methods=METHODS, variants={},
            splits={"zero_shot": {"kind": "unseen_combo", "datasets": ["zipped"]}},
            statistics={**statistics, "n_bootstrap": 200},
            method_params={}, method_seeds={}, studies={}, **changes,
        )  # fmt: skip


def write_cards(folder: Path, server: FileServer, raw: bytes) -> None:
    """One data set inside a zip, another as a gzip file; each pinned as a whole and as what is inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep/cells.h5ad", raw)
    packed = {"zipped": ("cells.zip", buffer.getvalue()), "gzipped": ("cells.h5ad.gz", gzip.compress(raw, mtime=0))}
    keys = yaml.safe_load((ROOT / "tests/configs/cards/tiny.yaml").read_text())["keys"]
    folder.mkdir()
    for dataset, (name, content) in packed.items():
        server.files[name] = content
        file = {"name": name, "urls": server.url(name), "bytes": len(content), "member": "deep/cells.h5ad"}
        file |= {"sha256": hashlib.sha256(content).hexdigest(), "member_sha256": hashlib.sha256(raw).hexdigest()}
        card = {"source": {"kind": "url", "files": [file]}, "keys": keys}
        (folder / f"{dataset}.yaml").write_text(yaml.safe_dump(card))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("offline")
    source = load_card("tiny", [ROOT / "tests/configs/cards"]).source
    assert isinstance(source, SimulationSource)
    write_simulation(source, "tiny", folder / "source.h5ad", folder / "truth.h5ad", None)
    with serve_files() as server:
        run = Run(folder)
        world = World(run, folder / "mirror", server.requests)
        write_cards(folder / "cards", server, (folder / "source.h5ad").read_bytes())
        world.configure()
        assert "2 files" in world.collect()
    yield world  # the server is stopped


def perturbed_lines(shown: str) -> set[str]:
    return {line for line in shown.splitlines() if line.startswith("perturbed: ")}


@pytest.mark.parametrize("blocked", [False, True], ids=["namespace", "sockets"])
def test_a_command_that_is_cut_off_reaches_nothing(blocked: bool, tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    with serve_files(there=b"x") as server:
        script = f"import urllib.request; print(urllib.request.urlopen('{server.url('there')}', timeout=5).read())"
        free = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "b'x'" in free.stdout, free.stderr
        command, variables = cut_off([sys.executable, "-c", script], tmp_path, blocked=blocked)
        cut = subprocess.run(command, env=Run(tmp_path).environment(variables), capture_output=True, text=True)
        assert cut.returncode != 0
        assert "URLError" in cut.stderr
        assert server.requests == ["there"]


def test_without_the_mirror_the_run_fails_with_one_clear_line(world: World) -> None:
    world.configure()
    shown = world.offline("data/zipped/raw.h5ad", check=False)
    (line,) = perturbed_lines(shown)  # the rule's retries say the same again
    assert line.startswith("perturbed: cells.zip: no source gave the file: http://127.0.0.1:")
    assert "give it as `mirror`" in line
    assert "Traceback" not in shown
    assert not (world.run.folder / "data/zipped/raw.h5ad").exists()


def test_with_the_mirror_the_run_finishes(world: World) -> None:
    """Data sets in a zip and in a gzip file, to tables and a figure; then there is nothing left to do."""
    world.configure(mirror="mirror")
    world.offline(*BENCHMARK)
    scores = pd.read_parquet(world.run.folder / "results/tables/scores.parquet")
    assert set(scores["dataset"]) == {"zipped"}
    assert set(METHODS) <= set(scores["method"])
    assert scores.loc[(scores["method"] == "additive") & (scores["metric"] == "rmse"), "value"].notna().all()
    for dataset in ("zipped", "gzipped"):
        assert (world.run.folder / f"data/{dataset}/prepared.h5ad").is_file()
    assert (world.run.folder / "results/figures/overview.svg").stat().st_size > 0
    assert "Nothing to be done" in world.offline(*BENCHMARK)
    origin = json.loads((world.run.folder / "data/downloads/.fetch/cells.zip.json").read_text())["origin"]
    assert origin == "mirror mirror"
    assert world.requests == ["cells.h5ad.gz", "cells.zip"]  # once each, by `perturbed mirror`


def test_a_damaged_mirror_is_not_used(world: World, tmp_path: Path) -> None:
    """What was carried is checked where it arrives; sockets that refuse are as good as no route."""
    world.configure(mirror="damaged", data="again")
    damaged = world.run.folder / "damaged"
    damaged.mkdir(exist_ok=True)
    content = (world.mirror / "cells.zip").read_bytes()
    (damaged / "cells.zip").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shown = world.offline("again/zipped/raw.h5ad", check=False, blocked=True)
    lines = perturbed_lines(shown)
    assert any("damaged/cells.zip: sha256" in line and "its addresses are tried" in line for line in lines)
    assert any("no source gave the file" in line for line in lines)
    assert not (world.run.folder / "again/zipped/raw.h5ad").exists()


# --- the Census ---------------------------------------------------------------------------------------------------


def pinned(server: FileServer, name: str, content: bytes) -> dict[str, Any]:
    server.files[name] = content
    return {"name": name, "urls": server.url(name), "sha256": hashlib.sha256(content).hexdigest()}


def write_axis_cards(folder: Path, server: FileServer) -> None:
    """A query of a small store, a model that is published and a library on the web."""
    from perturbed.data.census.model import fit_model
    from perturbed.data.census.query import query_cells
    from perturbed.data.census.simulate import write_simulation as simulate_census
    from perturbed.data.census.spec import CensusCard, ModelCard, SimulationCells

    params = {"n_cells": 400, "n_genes": 300, "n_donors": 2, "n_up": 10, "n_down": 10}
    cells = SimulationCells.model_validate({"kind": "simulation", "params": params})
    simulate_census(cells, "small", folder / "store", folder / "truth.csv", folder / "sets.gmt")
    query = {"kind": "query", "organism": "mus_musculus", "census_version": "2023-12-15", "uri": str(folder / "store")}
    query |= {"obs_filter": [{"column": "disease", "values": ["normal", "type 2 diabetes mellitus"]}]}
    query_cells(CensusCard.model_validate({"cells": query}), "small", folder / "direct.h5ad")
    quick = {"kind": "fit", "n_hidden": 8, "n_latent": 2, "epochs": 1, "min_genes": 0, "n_top_genes": None}
    fit_model(folder / "direct.h5ad", ModelCard.model_validate({"model": quick}), folder / "fitted")

    model = {"kind": "published", "organism": "mus_musculus", "census_version": "2023-12-15"}
    model["file"] = pinned(server, "small_model.pt", (folder / "fitted/model.pt").read_bytes())
    library = {"kind": "url", "file": pinned(server, "sets.gmt", (folder / "sets.gmt").read_bytes())}
    cards = {"census": {"cells": query}, "models": {"model": model}}
    cards["gene_sets"] = {"source": library, "organism": "mouse"}
    for kind, card in cards.items():
        (folder / kind).mkdir()
        (folder / kind / "small.yaml").write_text(yaml.safe_dump(card))


def test_cells_model_and_gene_sets_of_an_axis_come_from_the_mirror(tmp_path: Path) -> None:
    """The store is gone and the server stopped; the cells have the bytes that the query itself writes."""
    world = World(Run(tmp_path), tmp_path / "mirror", [])
    arms = {arm: {"column": "disease", "values": [value]} for arm, value in
            (("unperturbed", "normal"), ("perturbed", "type 2 diabetes mellitus"))}  # fmt: skip
    case = {"cells": "small", "model": "small", "gene_sets": ["small"], **arms}
    config = {
        "dataset": [], "methods": [], "splits": {}, "variants": {}, "method_params": {}, "method_seeds": {},
        "studies": {}, "axes": {"islets": case}, "census_cards": ["census"], "model_cards": ["models"],
        "gene_set_cards": ["gene_sets"], "mirror": "mirror",
    }  # fmt: skip
    world.run.configure(**config)
    with serve_files() as server:
        write_axis_cards(tmp_path, server)
        assert "3 files" in world.collect()
    (tmp_path / "store").rename(tmp_path / "gone")
    targets = ("data/census/small/cells.h5ad", "data/models/small", "data/census/small/gene_sets/small.gmt")
    world.offline(*targets)
    assert (tmp_path / targets[0]).read_bytes() == (tmp_path / "direct.h5ad").read_bytes()
    assert (tmp_path / targets[1] / "model.pt").read_bytes() == (tmp_path / "fitted/model.pt").read_bytes()
    assert len((tmp_path / targets[2]).read_text().splitlines()) > 100

    world.run.configure(**{**config, "mirror": None, "data": "bare"})
    shown = world.offline("bare/census/small/cells.h5ad", check=False)
    (line,) = perturbed_lines(shown)
    assert "store: no such store" in line
