"""Asking a server that misbehaves: each fault by itself, over real HTTP; and what of it is kept."""

from __future__ import annotations

import json
import threading
import time

import pytest
from judge_server import JudgeServer, asked_about, verdict
from judge_world import Oracle, make_spec

from perturbed.errors import DataError
from perturbed.pathways import judge_asking
from perturbed.pathways.judge_asking import Asker, TokenBucket, make_votes
from perturbed.pathways.judge_cache import AnswerCache, answer_key, final
from perturbed.pathways.judge_providers import (
    FORMATS,
    JudgeError,
    OpenAIProvider,
    Passing,
    read_answer,
    retry_after,
)
from perturbed.pathways.judge_questions import ask

KEY = "sk-verysecret-0123456789"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(judge_asking, "FIRST_WAIT", 0.02)


def run(script, path, n_pathways=3, names=None, **changes):
    """Ask a scripted server about some pathways; the server and the final answers by pathway and vote."""
    names = names or [f"Pathway {i}" for i in range(n_pathways)]
    with JudgeServer(script) as server:
        spec = make_spec(base_url=server.url, timeout=5, **changes)
        questions = {name: ask(name, spec) for name in names}
        with AnswerCache(path, writable=True) as cache:
            Asker(OpenAIProvider(spec), spec, cache).ask_all(make_votes(list(questions.values()), spec))
            answers = {
                (name, vote): final(cache.attempts(answer_key(spec, messages, vote)), spec.malformed_retries)
                for name, messages in questions.items()
                for vote in range(spec.n_votes)
            }
    return server, answers


# --- good answers -----------------------------------------------------------------------------------------------------


def test_votes_may_contradict_each_other_and_each_is_kept(tmp_path):
    server, answers = run(
        lambda request, before: verdict("yes" if before % 2 else "no"), tmp_path / "a.jsonl", n_votes=3, concurrency=1
    )
    for name in ("Pathway 0", "Pathway 1", "Pathway 2"):
        assert sorted(answers[name, vote]["relevant"] for vote in range(3)) == ["no", "no", "yes"]
    one = answers["Pathway 0", 0]
    assert one["model"] == "tiny-0001" and one["model_asked"] == "tiny" and one["temperature"] is None
    assert (one["input_tokens"], one["output_tokens"], one["format"]) == (100, 20, "json_schema")
    assert len(server.requests) == 9
    assert len({request["seed"] for request in server.requests}) == 9  # or a server with seeds repeats its answer


def test_the_request_holds_question_and_options_and_nothing_else(tmp_path):
    server, _ = run(
        lambda *_: verdict("no"), tmp_path / "a.jsonl", n_pathways=1, temperature=0.3, max_tokens=50, send_seed=False,
        extra={"reasoning_effort": "low"},
    )  # fmt: skip
    (request,) = server.requests
    assert set(request) == {"model", "messages", "temperature", "max_tokens", "response_format", "reasoning_effort"}
    assert request["temperature"] == 0.3 and len(request["messages"]) == 1
    text = request["messages"][0]["content"]
    assert "Pathway: Pathway 0\n" in text and "type 2 diabetes in mouse pancreatic islets" in text and "{" in text


def test_several_requests_are_in_flight_and_no_more_than_allowed(tmp_path):
    server, _ = run(lambda *_: verdict("yes", wait=0.15), tmp_path / "a.jsonl", n_pathways=8, concurrency=2)
    assert server.most_at_once == 2
    server, _ = run(lambda *_: verdict("yes", wait=0.02), tmp_path / "b.jsonl", n_pathways=4, concurrency=1)
    assert server.most_at_once == 1


# --- faults that pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "body": '{"error": {"message": "boom"}}'},
        {"status": 503, "body": "<html>down</html>"},
        {"status": 200, "body": "<html>proxy</html>", "headers": {"Content-Type": "text/html"}},
        {"status": 200, "body": "{half an ans"},
        {"wait": 1.0},
    ],
    ids=["500", "503", "page", "broken body", "timeout"],
)
def test_a_fault_on_the_way_is_tried_again_and_not_kept(fault, tmp_path):
    path = tmp_path / "a.jsonl"
    with JudgeServer(lambda request, before: fault if before == 0 else verdict("yes")) as server:
        spec = make_spec(base_url=server.url, timeout=0.4)
        with AnswerCache(path, writable=True) as cache:
            Asker(OpenAIProvider(spec), spec, cache).ask_all(make_votes([ask("A", spec)], spec))
    assert len(server.requests) == 2
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["status"] == "answer"


def test_who_is_told_to_wait_waits_and_so_do_the_others(tmp_path):
    too_many = {"status": 429, "headers": {"Retry-After": "1"}, "body": '{"error": {"message": "slow down"}}'}
    lock, told = threading.Lock(), []

    def script(request, before):
        with lock:
            if not told:
                told.append(time.monotonic())
                return too_many
        return verdict("yes")

    server, answers = run(script, tmp_path / "a.jsonl", n_pathways=6, concurrency=1)
    assert len(server.requests) == 7 and all(one["relevant"] == "yes" for one in answers.values())
    assert min(at for at in server.times if at > told[0]) - told[0] >= 0.95


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after(None) is None and retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2115 07:28:00 GMT") > 1e6


def test_giving_up_is_one_line_and_loses_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    down = {"status": 502, "body": "down"}

    def script(request, before):
        return down if asked_about(request) == "Pathway 3" else verdict("yes")

    with pytest.raises(JudgeError, match=r"did not answer in 3 tries .*502.*of 5 answers are in .*a\.jsonl") as error:
        run(script, path, n_pathways=5, retries=2, concurrency=1)
    assert "\n" not in str(error.value)
    kept = len(path.read_text().splitlines())
    assert f"{kept} of 5 answers" in str(error.value)
    server, answers = run(lambda *_: verdict("no"), path, n_pathways=5)
    assert len(server.requests) == 5 - kept  # the rest, and only that
    assert sum(one["relevant"] == "yes" for one in answers.values()) == kept


def test_a_server_that_is_not_there_is_named(tmp_path):
    spec = make_spec(base_url="http://127.0.0.1:9/v1", retries=1)
    with AnswerCache(tmp_path / "a.jsonl", writable=True) as cache, pytest.raises(JudgeError) as error:
        Asker(OpenAIProvider(spec), spec, cache).ask_all(make_votes([ask("A", spec)], spec))
    assert "tiny at http://127.0.0.1:9/v1 did not answer in 2 tries" in str(error.value)


@pytest.mark.parametrize(
    ("status", "mend"),
    [(401, "OPENAI_TEST_KEY"), (404, "check `base_url` and `model`"), (400, "`temperature: null`")],
)
def test_a_refused_request_is_not_tried_again(status, mend, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_TEST_KEY", KEY)
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with pytest.raises(JudgeError) as error:
        run(lambda *_: {"status": status, "body": body}, tmp_path / "a.jsonl", n_pathways=1, key_env="OPENAI_TEST_KEY")
    assert mend in str(error.value) and KEY not in str(error.value) and "***" in str(error.value)


# --- answers that cannot be read --------------------------------------------------------------------------------------


def test_a_malformed_answer_is_asked_again_and_then_invalid(tmp_path):
    def script(request, before):
        return {"content": "Yes!"} if asked_about(request) == "Pathway 1" or before == 0 else verdict("yes")

    path = tmp_path / "a.jsonl"
    server, answers = run(script, path, malformed_retries=2)
    assert answers["Pathway 0", 0]["relevant"] == "yes" and answers["Pathway 0", 0]["attempt"] == 1
    invalid = answers["Pathway 1", 0]
    assert invalid["status"] == "malformed" and invalid["relevant"] is None and invalid["reason"] == "Yes!"
    assert len(server.requests) == 2 + 3 + 2 == len(path.read_text().splitlines())
    again, _ = run(script, path, malformed_retries=2)
    assert not again.requests
    more, _ = run(lambda *_: verdict("no"), path, malformed_retries=3)  # another try is allowed now
    assert [asked_about(request) for request in more.requests] == ["Pathway 1"]


@pytest.mark.parametrize(
    "what",
    [
        {"content": None, "refusal": "I will not."},
        {"content": "I'm sorry, but I can't help with that."},
        {"content": "", "finish_reason": "content_filter"},
    ],
)
def test_a_refusal_is_kept_as_one_and_not_asked_again(what, tmp_path):
    server, answers = run(lambda *_: what, tmp_path / "a.jsonl", n_pathways=1)
    assert answers["Pathway 0", 0]["status"] == "refusal" and len(server.requests) == 1


@pytest.mark.parametrize("what", [{"choices": []}, {"content": ""}, {"content": None}, {"content": '{"relevant": 3}'}])
def test_empty_answers_are_malformed(what, tmp_path):
    _, answers = run(lambda *_: what, tmp_path / "a.jsonl", n_pathways=1, malformed_retries=0)
    assert answers["Pathway 0", 0]["status"] == "malformed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"relevant": "yes", "confidence": 0.5, "reason": "so"}', ("yes", 0.5, "so")),
        ('```json\n{"relevant": "No.", "confidence": 7}\n```', ("no", None, "")),
        ('Well: {"relevant": true} I think {x}', ("yes", None, "")),
        ('<think>{"relevant": "no"}</think>{"relevant": "yes"}', ("yes", None, "")),
        ('{"a": 1} {"relevant": "no", "confidence": true, "reason": null}', ("no", None, "")),
        ('{"relevant": "yes"} {"relevant": "yes"}', ("yes", None, "")),
    ],
)
def test_an_answer_is_found_in_its_text(text, expected):
    assert read_answer(text) == expected


@pytest.mark.parametrize(
    "text", ['{"relevant": "yes"} {"relevant": "no"}', "yes", "", '{"relevant": "maybe"}', "{" * 5000]
)
def test_what_is_no_verdict_is_none(text):
    with pytest.raises(ValueError, match=r"verdict|contradicts"):
        read_answer(text)


# --- servers that know less -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize(("known", "asked"), [("json_object", 3), (None, 4)])
def test_a_server_without_structured_answers_is_asked_for_less(known, asked, status, tmp_path):
    def script(request, before):
        form = request.get("response_format")
        if form and (form["type"] != known or "schema" in form):
            return {"status": status, "body": '{"error": {"message": "response_format is not supported"}}'}
        return {"content": 'Sure. {"relevant": "yes"}'}

    server, answers = run(script, tmp_path / "a.jsonl", concurrency=1)
    assert len(server.requests) == asked - 1 + 3  # the refusals once, not for every question
    assert {one["format"] for one in answers.values()} == {FORMATS[asked - 1][0]}


def test_a_server_that_calls_the_longest_answer_otherwise(tmp_path):
    def script(request, before):
        if "max_tokens" in request:
            return {"status": 400, "body": '{"error": {"message": "Use \'max_completion_tokens\' instead."}}'}
        return verdict("yes")

    server, _ = run(script, tmp_path / "a.jsonl", n_pathways=2, max_tokens=70, concurrency=1)
    assert [request.get("max_completion_tokens") for request in server.requests] == [None, 70, 70]


# --- pace -------------------------------------------------------------------------------------------------------------


def test_the_bucket_lets_through_no_more_than_its_rate():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    bucket, taken = TokenBucket(120, 3, lambda: now[0], sleep), []
    for _ in range(11):
        bucket.take()
        taken.append(now[0])
    assert taken[:3] == [0, 0, 0]
    assert taken[3:] == pytest.approx([0.5 * i for i in range(1, 9)])
    bucket.pause(10)
    bucket.take()
    assert now[0] == pytest.approx(14)


def test_requests_keep_to_the_rate(tmp_path):
    server, _ = run(
        lambda *_: verdict("yes"), tmp_path / "b.jsonl", n_pathways=4, requests_per_minute=240, concurrency=1
    )
    assert max(server.times) - min(server.times) >= 3 * 0.25 * 0.95


def test_back_off_doubles_and_ends(monkeypatch):
    waits = []
    asker = Asker(Oracle(None), make_spec(retries=9), AnswerCache(None, writable=False))
    monkeypatch.setattr(asker, "_sleep", waits.append)
    monkeypatch.setattr(judge_asking, "FIRST_WAIT", 1.0)
    patience = type("Fixed", (), {"random": lambda self: 1.0})()
    for trial in range(9):
        asker._wait(Passing("x"), trial, patience)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    with pytest.raises(JudgeError, match="in 10 tries"):
        asker._wait(Passing("x"), 9, patience)
    with pytest.raises(JudgeError, match="come back in 3600 s"):
        asker._wait(Passing("x", 3600), 0, patience)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    run(lambda *_: verdict("yes"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    AnswerCache(path, writable=False)
    assert path.read_bytes() == whole[:-30]  # who only reads changes nothing
    server, answers = run(lambda *_: verdict("yes"), path)
    assert len(server.requests) == 1 and len(answers) == 3
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [("{x", "line 2 is no JSON"), ('{"a": 1}', "line 2 is no answer of a judge"),
     ('{"key": "k", "status": "answer", "relevant": "so"}', "line 2: relevant is 'so'")],
)  # fmt: skip
def test_a_broken_line_within_is_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    run(lambda *_: verdict("yes"), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=message):
        AnswerCache(path, writable=False)


def test_two_writers_do_not_share_a_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerCache(path, writable=True), pytest.raises(DataError, match="another `perturbed judge` writes to it"):
        AnswerCache(path, writable=True)
    AnswerCache(path, writable=True).close()


def test_the_key_is_of_what_is_asked_and_not_of_where_or_how_often():
    spec = make_spec()
    key = answer_key(spec, ask("A", spec), 0)
    for same in ({"base_url": "http://localhost/v1"}, {"n_votes": 5}, {"timeout": 3}, {"aggregation": "any"}):
        other = make_spec(**same)
        assert answer_key(other, ask("A", other), 0) == key
    for other in (
        {"model": "x"},
        {"temperature": 0},
        {"max_tokens": 9},
        {"seed": 1},
        {"subject": "gout"},
        {"extra": {"a": 1}},
    ):
        changed = make_spec(**other)
        assert answer_key(changed, ask("A", changed), 0) != key
    assert answer_key(spec, ask("A", spec), 1) != key and answer_key(spec, ask("B", spec), 0) != key
