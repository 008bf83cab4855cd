"""Cut a command off from every network: in a network namespace without a route, or, where none is to be had, by sockets
that refuse to connect."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

# Loaded by every Python of the run.
BLOCKER = """
import socket
_connect = socket.socket.connect
def refuse(self, address):
    if self.family == socket.AF_UNIX:
        return _connect(self, address)
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = refuse
def no_name(*_, **__):
    raise socket.gaierror(-3, "Temporary failure in name resolution")
socket.getaddrinfo = socket.gethostbyname = no_name
"""


@cache
def namespace() -> tuple[str, ...]:
    """The command that runs another one in a network namespace of its own; empty where that is not allowed."""
    for command in (("unshare", "-n"), ("unshare", "-r", "-n")):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return ()


def cut_off(command: list[str], folder: Path, *, blocked: bool = False) -> tuple[list[str], dict[str, str]]:
    """The command without a network, and the variables that it needs; `blocked` asks for refusing sockets."""
    if namespace() and not blocked:
        return [*namespace(), *command], {}
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(BLOCKER)
    return command, {"PYTHONPATH": os.pathsep.join([str(hooks), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
