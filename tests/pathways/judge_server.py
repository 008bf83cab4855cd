"""A server on this machine that speaks just enough of chat completions, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict[str, Any], int], "dict[str, Any]"]
"""From the request and how often this very question came before, to what happens: keys `status`, `headers`, `body`
(text as it is), `content`, `refusal`, `finish_reason`, `wait` (seconds before the answer), `choices`, `usage`."""


def verdict(relevant: str, **more: Any) -> dict[str, Any]:
    """An answer as it should be."""
    return {"content": json.dumps({"relevant": relevant, "confidence": 0.8, "reason": "because"}), **more}


def asked_about(request: dict[str, Any]) -> str:
    """The pathway that a question of the default prompt is about."""
    text = request["messages"][-1]["content"]
    return text.split("Pathway: ", 1)[1].split("\n", 1)[0]


class JudgeServer:
    """The server; `requests` are those that came, `most_at_once` how many were ever in flight."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._seen: Counter[str] = Counter()
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._answer(self, request)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.requests.append(request)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            question = json.dumps(request["messages"])
            before = self._seen[question]
            self._seen[question] += 1
        try:
            what = self.script(request, before)
            time.sleep(what.get("wait", 0))
        finally:
            with self._lock:
                self._now -= 1
        self._send(handler, request, what)

    def _send(self, handler: BaseHTTPRequestHandler, request: dict[str, Any], what: dict[str, Any]) -> None:
        body = what.get("body")
        if body is None:
            message = {"role": "assistant", "content": what.get("content"), "refusal": what.get("refusal")}
            choice = {"index": 0, "message": message, "finish_reason": what.get("finish_reason", "stop")}
            usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
            body = json.dumps(
                {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"] + "-0001",
                 "choices": what.get("choices", [choice]), "usage": what.get("usage", usage)}
            )  # fmt: skip
        data = body.encode()
        try:
            handler.send_response(what.get("status", 200))
            for name, value in {"Content-Type": "application/json", **what.get("headers", {})}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # who asked has gone
            handler.close_connection = True
