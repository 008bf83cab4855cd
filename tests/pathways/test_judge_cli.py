"""`perturbed judge` as a process: the key stands nowhere, and being killed loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import JudgeServer, asked_about, verdict
from judge_world import COMMAND_LINE, Oracle, make_spec, write_world

from perturbed.pathways.judge import judge_pathways
from perturbed.pathways.judge_spec import JudgeSpec

KEY = "sk-verysecret-0123456789"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def start(world, out: Path, cache: Path, spec: dict, **environment: str) -> subprocess.Popen:
    folder, libraries = world
    call = [sys.executable, "-c", COMMAND_LINE, "judge", "--enrichment", str(folder), "--out", str(out)]
    call += ["--cache", str(cache), "--spec", json.dumps(spec), "--gene-sets", f"wiki={libraries['wiki']}"]
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


def test_the_key_is_sent_and_stands_nowhere(world, tmp_path):
    out, cache = tmp_path / "run" / "out", tmp_path / "run" / "cache.jsonl"

    def leaky(request, before):  # a server that repeats the key wherever it can
        if len(server.requests) == 1:
            return {"status": 500, "body": json.dumps({"error": {"message": f"failed for {KEY}"}})}
        if asked_about(request).endswith("1"):
            return {"content": f"your key is {KEY}"}
        return {"content": json.dumps({"relevant": "yes", "reason": f"since {KEY}"})}

    with JudgeServer(leaky) as server:
        spec = {
            "provider": "openai",
            "model": "tiny",
            "base_url": server.url,
            "key_env": "OPENAI_TEST_KEY",
            "n_votes": 1,
        }
        process = start(world, out, cache, spec, OPENAI_TEST_KEY=KEY, OPENAI_LOG="debug")
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        server.script = lambda *_: {"status": 401, "body": json.dumps({"error": {"message": f"bad key {KEY}"}})}
        refused = start(world, out, tmp_path / "run" / "other.jsonl", spec, OPENAI_TEST_KEY=KEY)
        line, _ = refused.communicate(timeout=300)
    assert refused.returncode == 1 and line.count("\n") == 1 and "environment variable OPENAI_TEST_KEY" in line
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"cache.jsonl", "out.provenance.json", "verdicts.csv", "cost.json"} <= {path.name for path in files}
    for path in files:
        assert KEY not in path.read_text(), path
    assert KEY not in said and KEY not in line
    record = json.loads((tmp_path / "run" / "out.provenance.json").read_text())
    assert record["settings"]["judge"]["key_env"] == "OPENAI_TEST_KEY"


def test_a_key_on_the_command_line_is_refused(world, tmp_path):
    spec = {"provider": "openai", "model": "tiny", "base_url": "http://127.0.0.1:9/v1", "key_env": "OPENAI_TEST_KEY"}
    process = start(world, tmp_path / "out", tmp_path / "c", {**spec, "subject": f"gout {KEY}"}, OPENAI_TEST_KEY=KEY)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "stands on the command line" in said and KEY not in said
    assert not list(tmp_path.glob("out*"))


def test_killed_in_the_middle_it_asks_only_what_is_missing(world, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache.jsonl"
    folder, libraries = world
    with JudgeServer(lambda *_: verdict("yes", wait=0.05)) as server:
        spec = {"provider": "openai", "model": "tiny", "base_url": server.url, "key_env": None, "n_votes": 1}
        process = start(world, out, cache, {**spec, "concurrency": 2})
        ends = time.monotonic() + 240
        while len(server.requests) < 30 and time.monotonic() < ends and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        time.sleep(0.2)  # what was under way is answered to nobody
        asked = len(server.requests)
        kept = {json.loads(line)["key"] for line in cache.read_text().splitlines() if line.endswith("}")}
        assert 30 - 2 <= len(kept) <= asked < 125 and asked - len(kept) <= 2 and not out.exists()
        with cache.open("a") as handle:
            handle.write('{"key": "torn')
        server.script = lambda *_: verdict("yes")
        judge_pathways(folder, libraries, JudgeSpec(**spec), out, cache=cache)
    assert len(server.requests) - asked == 125 - len(kept)
    assert len(cache.read_text().splitlines()) == 125
    whole = tmp_path / "whole"
    judge_pathways(folder, libraries, make_spec(n_votes=1), whole, provider=Oracle(lambda text, vote: "yes"))
    assert (out / "odds.csv").read_bytes() == (whole / "odds.csv").read_bytes()
