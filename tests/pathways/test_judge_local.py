"""A real model on this machine answers the judge: where `.envs/llama` was made."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from judge_world import make_spec

from perturbed.pathways.judge_asking import Asker, make_votes
from perturbed.pathways.judge_cache import AnswerCache, answer_key, final
from perturbed.pathways.judge_providers import OpenAIProvider
from perturbed.pathways.judge_questions import ask

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("PERTURBED_LLAMA_ROOT", ROOT))
"""Folder that holds `.envs/llama`."""
pytestmark = pytest.mark.skipif(
    not (HOME / ".envs" / "llama" / ".ready").is_file(), reason="no .envs/llama; make it with envs/environment.sh llama"
)


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(ROOT / "envs" / "llama_server.sh"), str(port)], cwd=HOME, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr.read().decode()
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_model_gives_verdicts_that_can_be_read_and_repeated(server, tmp_path):
    names = ("Insulin signaling", "Spinal cord injury")
    spec = make_spec(
        base_url=server, model="smollm2", n_votes=2, max_tokens=120, temperature=0.7, concurrency=1, timeout=300
    )
    votes = make_votes([ask(name, spec) for name in names], spec)
    answers = []
    for run in ("one", "two"):
        with AnswerCache(tmp_path / f"{run}.jsonl", writable=True) as cache:
            Asker(OpenAIProvider(spec), spec, cache).ask_all(votes)
            answers.append(
                {
                    (name, vote): final(cache.attempts(answer_key(spec, ask(name, spec), vote)), spec.malformed_retries)
                    for name in names
                    for vote in range(2)
                }
            )
    for one in answers[0].values():
        assert one["model"] == "smollm2" and one["input_tokens"] > 100 and 0 < one["output_tokens"] <= 120
    read = [one for one in answers[0].values() if one["status"] == "answer"]
    assert read and all(one["relevant"] in ("yes", "no") for one in read)
    same = [answers[0][key]["reason"] == answers[1][key]["reason"] for key in answers[0]]
    assert any(same)  # the server honours seeds
