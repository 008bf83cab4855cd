"""Wrong and broken inputs of every verb: one line that names file and mend, nothing written, nothing old touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from breaking import (
    Break,
    binary,
    empty,
    folder,
    half,
    missing,
)  # fmt: skip
from fault_world import STAGES, copy, invoke, snapshot

from perturbed.provenance import record_path

MEND = re.compile(
    r"delete|rerun|run again|remake|anew|[Mm]ake (it|the|one)|correct|mend|loosen|lower|give|use |need|check the|leave"
    r"|name |by tabs|did you mean|valid:|names them like"
)
READ_BY = {
    "raw.h5ad": ("prepare", "fetch"),
    "prepared.h5ad": ("split", "features", "check-leakage", "fit", "predict", "evaluate"),
    "split.csv": ("features", "fit", "evaluate"),
    "features.csv": ("check-leakage", "fit", "evaluate", "study probe"),
    "leakage.json": ("fit",),
    "model/config.json": ("predict", "study programs"),
    "model/state.pt": ("predict", "study map"),
    "additive/state.npz": ("predict additive",),
    "own/prediction.h5ad": ("evaluate",),
    "truth.h5ad": ("evaluate references", "study programs"),
    "scores.parquet": ("summarise", "study tabulate"),
    "tables/summary.csv": ("figure",),
    "study.csv": ("study draw",),
    "setting.csv": ("study gather",),
    "planted.gmt": ("study programs",),
    "decoder/state.pt": ("flow case",),
    "flows/all/seed0/screen.csv": ("flow gather",),
    "flows/tables/screen_seeds.csv": ("flow draw",),
    "cells.h5ad": ("census model", "score-genes", "gradients", "gene-sets"),
    "islets.gmt": ("gene-sets",),
    "scvi/model.pt": ("score-genes", "gradients"),
    "truth.csv": ("enrich", "score-genes"),
    "axis/rankings.csv": ("enrich", "axis draw"),
    "axis/gene_scores.csv": ("axis draw",),
    "sets.gmt": ("enrich", "judge"),
    "enrichment/enrichment.csv": ("judge", "axis pathways"),
    "enrichment/top.csv": ("judge",),
    "judgement/verdicts.csv": ("axis judge",),
    "answers.jsonl": ("judge",),
}
"""Every kind of output, and verbs that read it."""


def broken(world: Path, name: str, change: Break, scratch: Path) -> dict[str, Path | str]:
    """Replacements of the world's files, so that a command reads a broken copy of one of them."""
    top = next(p for p in (name, *map(str, Path(name).parents)) if f"<{p}>" in COMMANDS)
    target = copy(world / top, scratch / top)
    change(target / Path(name).relative_to(top))
    return {top: target}


COMMANDS = "\n".join(part for stage in STAGES.values() for part in stage.command)


def refused(stage: str, world: Path, scratch: Path, files: Mapping[str, Path | str]) -> str:
    """Run the stage over existing outputs; return its one line."""
    out = scratch / "out"
    for output in STAGES[stage].outputs:
        (out / output).parent.mkdir(parents=True, exist_ok=True)
        if (world / output).is_dir():
            (out / output).mkdir()
            (out / output / "table.csv").write_text("old")
        else:
            (out / output).write_text("old")
        record_path(out / output).write_text("{}")
    before = snapshot(out)
    done = invoke(STAGES[stage].arguments(world, out, files))
    said = done.stderr.strip()
    assert done.exit_code == 1, (done.exit_code, done.exception, done.output)
    lines = [line for line in said.splitlines() if line.startswith("perturbed: ")]
    assert len(lines) == 1 and said.endswith(lines[0]), said
    assert snapshot(out) == before, "an existing output was touched, or something was left"
    assert all(record_path(out / output).read_text() == "{}" for output in STAGES[stage].outputs)
    return lines[0]


@pytest.mark.bad_input
@pytest.mark.parametrize("change", [empty, half, missing], ids=lambda change: getattr(change, "__name__", "empty"))
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in READ_BY.items() for stage in stages])
def test_a_torn_output_is_not_taken_as_done(name: str, stage: str, change: Break, world: Path, tmp_path: Path):
    """Zero bytes, half or nothing of each kind of output, with the time it had."""
    line = refused(stage, world, tmp_path, broken(world, name, change, tmp_path / "in"))
    top = Path(name).parts[0]
    assert Path(name).name in line or f"{top}:" in line, line
    assert MEND.search(line), line


@pytest.mark.bad_input
@pytest.mark.parametrize("change", [binary, folder])
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("split.csv", "features"), ("features.csv", "fit"), ("leakage.json", "fit"), ("prepared.h5ad", "split"),
        ("model/state.pt", "predict"), ("additive/state.npz", "predict additive"), ("scores.parquet", "summarise"),
        ("tables/summary.csv", "figure"), ("scvi/model.pt", "score-genes"), ("sets.gmt", "enrich"),
        ("axis/rankings.csv", "enrich"), ("answers.jsonl", "judge"), ("truth.csv", "enrich"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_at_all(name: str, stage: str, change: Break, world: Path, tmp_path: Path):
    """Bytes of something else, and a folder in its place: as unreadable as without permission."""

    def with_no_record(path: Path) -> None:
        change(path)
        for place in (path, path.parent):
            record_path(place).unlink(missing_ok=True)

    line = refused(stage, world, tmp_path, broken(world, name, with_no_record, tmp_path / "in"))
    assert Path(name).name in line or f"{Path(name).parts[0]}:" in line, line
    assert MEND.search(line), line
