"""docs/reliability.md names tests that exist, and there are as many faults as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest
from fault_world import ROOT

PAGE = (ROOT / "docs/reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def collected(marker: str) -> int:
    call = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marker, str(ROOT / "tests/faults")]
    shown = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    return sum("::" in line for line in shown.splitlines())


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_named_test_exists(file: str, test: str):
    assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_every_promise_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]
    assert len(rows) >= 20
    assert [row for row in rows if "::" not in row] == []


@pytest.mark.parametrize(("marker", "least"), [("bad_input", 60), ("kill_point", 20)])
def test_there_are_enough_faults(marker: str, least: int):
    assert collected(marker) >= least
