"""A small web server of this machine: files by name, ranges, redirects; it counts what it is asked for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """What is served, and what was asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


class _Handler(BaseHTTPRequestHandler):
    served: FileServer

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.served.requests.append(name)
        if name in self.served.redirects:
            self.send_response(302)
            self.send_header("Location", self.served.redirects[name])
            self.end_headers()
            return
        body = self.served.files.get(name)
        if body is None:
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])


@contextmanager
def serve_files(**files: bytes) -> Iterator[FileServer]:
    """Serve these files until the body ends; `files` can be changed meanwhile."""
    served = FileServer(files=dict(files))
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"served": served}))
    http.daemon_threads = True
    served.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
