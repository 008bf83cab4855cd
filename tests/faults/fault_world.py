"""Every verb of the pipeline on tiny data: what it reads, what it writes. Built once; faults are put into copies.

In a command, `<name>` is a file of the world and `@/name` one of the folder written to.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perturbed.provenance import record_path

ROOT = Path(__file__).parents[2]
CARD = str(ROOT / "tests/configs/cards/tiny.yaml")
BETA = "type B pancreatic cell"
NORMAL, DISEASE = "normal", "type 2 diabetes mellitus"


def as_json(**value: Any) -> str:
    return json.dumps(value)


@dataclass(frozen=True)
class Stage:
    """One verb: its command and what it leaves in the folder it writes to."""

    command: Sequence[str]
    outputs: Sequence[str]

    def arguments(self, world: Path, out: Path, files: Mapping[str, Path | str] | None = None) -> list[str]:
        """The command with paths filled in; `files` gives other ones for some names of the world."""
        files = files or {}

        def fill(found: re.Match[str]) -> str:
            return str(files.get(found[1], world / found[1]))

        return [re.sub(r"<([^<>]+)>", fill, part).replace("@/", f"{out}/") for part in self.command]


def _stage(text: str, *outputs: str, **options: str) -> Stage:
    """Words of `text`, where `{name}` is a whole argument of `options`."""
    words = [options.get(word.strip("{}"), word) if word.startswith("{") else word for word in text.split()]
    return Stage(words, outputs)


_SPLIT = as_json(kind="unseen_combo")
_FEATURES = as_json(n_hvg="all", n_pcs=5)
_VAE = as_json(
    title="PerturbedVAE", implementation="perturbed.models.perturbedvae:PerturbedVAE", stochastic=True,
    params={"n_nu": 4, "n_iota": 8, "n_hidden": 16, "epochs": 3, "n_samples": 5},
)  # fmt: skip
_NB_VAE = as_json(
    title="decoder", implementation="perturbed.models.nb_vae:NBVAE", stochastic=True,
    params={"n_latent": 3, "hidden": [16], "batch_size": 64, "epochs": 3, "min_epochs": 1},
)  # fmt: skip
_ISLETS = as_json(cells={
    "kind": "simulation", "seed": 3,
    "params": {"n_cells": 500, "n_genes": 300, "n_donors": 2, "n_up": 12, "n_down": 12, "n_decoys": 150,
               "depth": 700.0},
})  # fmt: skip
_SCVI = as_json(model={
    "kind": "fit", "n_hidden": 16, "n_latent": 4, "epochs": 2, "lr": 0.01, "batch_size": 64, "kl_warmup": 1,
    "min_genes": 20, "n_top_genes": None,
})  # fmt: skip
AXIS = as_json(
    cells="islets", model="islets", unperturbed={"column": "disease", "values": NORMAL}, n_cells=60,
    perturbed={"column": "disease", "values": DISEASE}, min_cells=10, top=20, n_bootstrap=100, n_permutations=99,
    judged=[BETA],
)  # fmt: skip
FLOW = as_json(
    dataset="tiny", split="zero_shot", method="decoder", screen=True, n_bootstrap=100, n_permutations=99,
    unperturbed={"column": "perturbation", "values": ["control"]}, n_steps=3, n_random_genes=5,
)  # fmt: skip
EVALUATION = as_json(max_cells=20, n_halves=2)
STATISTICS = as_json(n_bootstrap=200)
COMPARISON = as_json(
    kind="comparison", title="t", splits=["zero_shot"], methods=["additive"], metrics=["rmse_relative"]
)
SETTING = as_json(
    name="base", factor="base", level="base", world={"n_genes": 80, "n_train": 240, "n_test": 120},
    estimator={"n_hidden": 8, "n_components": 11, "steps": 5, "restarts": 1},
)  # fmt: skip
PROBE = as_json(kind="probe", title="t", dataset="tiny", split="zero_shot", methods=["perturbedvae"])
PROGRAMS = as_json(kind="programs", title="t", dataset="tiny", split="zero_shot", method="perturbedvae")
MAP = as_json(kind="latent_map", title="t", dataset="tiny", split="zero_shot", methods=["perturbedvae"], n_cells=60)
JUDGE = as_json(
    provider="replay", model="tiny", replay="<answers.jsonl>", n_votes=1, key_env=None, n_random=100,
)  # fmt: skip
_FOLD = "--prepared <prepared.h5ad> --split <split.csv> --features <features.csv>"
_FIT = f"fit {_FOLD} --leakage <leakage.json> --device cpu"
_DRAWN = ("svg", "png", "csv")

STAGES: dict[str, Stage] = {
    "simulate": _stage(
        "simulate --dataset tiny --card {card} --out @/raw.h5ad --truth @/truth.h5ad --gene-sets @/planted.gmt",
        "raw.h5ad", "truth.h5ad", "planted.gmt", card=CARD,
    ),
    "fetch": _stage(
        "fetch --dataset copied --card {card} --out @/copied.h5ad", "copied.h5ad",
        card=as_json(source={"kind": "path", "path": "<raw.h5ad>"}),
    ),
    "prepare": _stage(
        "prepare --dataset tiny --raw <raw.h5ad> --card {card} --out @/prepared.h5ad", "prepared.h5ad", card=CARD
    ),
    "split": _stage(
        "split --dataset tiny --name zero_shot --prepared <prepared.h5ad> --spec {spec} --out @/split.csv",
        "split.csv", spec=_SPLIT,
    ),
    "features": _stage(
        "features --prepared <prepared.h5ad> --split <split.csv> --spec {spec} --out @/features.csv",
        "features.csv", spec=_FEATURES,
    ),
    "check-leakage": _stage(f"check-leakage {_FOLD} --out @/leakage.json", "leakage.json"),
    "fit additive": _stage(
        f"{_FIT} --method {{method}} --name additive --history @/additive.csv --out @/additive",
        "additive", "additive.csv", method=str(ROOT / "config/methods/additive.yaml"),
    ),
    "fit": _stage(
        f"{_FIT} --method {{method}} --name perturbedvae --checkpoint @/checkpoint.pt --history @/training.csv"
        " --out @/model",
        "model", "training.csv", method=_VAE,
    ),
    "fit decoder": _stage(f"{_FIT} --method {{method}} --name decoder --out @/decoder", "decoder", method=_NB_VAE),
    "predict": _stage(
        "predict --model <model> --split <split.csv> --prepared <prepared.h5ad> --method perturbedvae"
        " --out @/vae/prediction.h5ad", "vae/prediction.h5ad", "vae/cells.h5ad",
    ),
    "predict additive": _stage(
        "predict --model <additive> --split <split.csv> --prepared <prepared.h5ad> --method additive"
        " --out @/own/prediction.h5ad", "own/prediction.h5ad",
    ),
    "evaluate": _stage(
        "evaluate --truth <prepared.h5ad> --split <split.csv> --features <features.csv> --spec {spec}"
        " --prediction <own/prediction.h5ad> --details @/details --out @/scores.parquet",
        "scores.parquet", "details", spec=EVALUATION,
    ),
    "evaluate references": _stage(
        "evaluate --truth <prepared.h5ad> --split <split.csv> --features <features.csv> --spec {spec}"
        " --references --noise-free <truth.h5ad> --out @/references.parquet", "references.parquet", spec=EVALUATION,
    ),
    "summarise": _stage(
        "summarise <scores.parquet> <references.parquet> --spec {spec} --out @/tables", "tables", spec=STATISTICS
    ),
    "figure": _stage(
        "figure overview --tables <tables> --spec {spec} --out @/overview",
        *(f"overview.{kind}" for kind in _DRAWN), spec=STATISTICS,
    ),
    "config": _stage(
        "config --resolve {config} --out @/config.yaml", "config.yaml", config=str(ROOT / "tests/configs/tiny.yaml")
    ),
    "study tabulate": _stage(
        "study tabulate <scores.parquet> <references.parquet> --spec {spec} --statistics {statistics}"
        " --out @/study.csv",
        "study.csv", spec=COMPARISON, statistics=STATISTICS,
    ),
    "study draw": _stage(
        "study draw --table <study.csv> --spec {spec} --out @/study_figure",
        *(f"study_figure.{kind}" for kind in _DRAWN), spec=COMPARISON,
    ),
    "study identify": _stage(
        "study identify --setting {setting} --device cpu --out @/setting.csv", "setting.csv", setting=SETTING
    ),
    "study gather": _stage("study gather <setting.csv> <setting.csv> --out @/gathered.csv", "gathered.csv"),
    "study probe": _stage(
        f"study probe {_FOLD} --model perturbedvae@0=<model> --spec {{spec}} --out @/probe.csv", "probe.csv", spec=PROBE
    ),
    "study programs": _stage(
        "study programs --prepared <prepared.h5ad> --features <features.csv> --model <model> --gene-sets <planted.gmt>"
        " --truth <truth.h5ad> --spec {spec} --out @/programs", "programs", spec=PROGRAMS,
    ),
    "study map": _stage(
        f"study map {_FOLD} --model perturbedvae@0=<model> --spec {{spec}} --out @/map.csv", "map.csv", spec=MAP
    ),
    "flow case": _stage(
        f"flow case --model <decoder> {_FOLD} --spec {{spec}} --out @/flows/all/seed0", "flows/all/seed0", spec=FLOW
    ),
    "flow gather": _stage("flow gather <flows/all/seed0> --out @/flows/tables", "flows/tables"),
    "flow draw": _stage(
        "flow draw screen --tables <flows/tables> --out @/screen", *(f"screen.{kind}" for kind in _DRAWN)
    ),
    "census simulate": _stage(
        "census simulate --name islets --card {card} --store @/store --truth @/truth.csv --gene-sets @/islets.gmt",
        "store", "truth.csv", "islets.gmt", card=_ISLETS,
    ),
    "census query": _stage(
        "census query --name islets --card {card} --store <store> --out @/cells.h5ad", "cells.h5ad", card=_ISLETS
    ),
    "census model": _stage(
        "census model --name islets --card {card} --cells <cells.h5ad> --out @/scvi", "scvi", card=_SCVI
    ),
    "gene-sets": _stage(
        "gene-sets --card {card} --name planted --var-table <cells.h5ad> --out @/sets.gmt",
        "sets.gmt", "sets.mapping.csv",
        card=as_json(source={"kind": "path", "path": "<islets.gmt>"}, organism="mouse"),
    ),
    "score-genes": _stage(
        "score-genes --cells <cells.h5ad> --model <scvi> --spec {spec} --truth <truth.csv> --out @/axis",
        "axis", spec=AXIS,
    ),
    "axis draw": _stage(
        "axis draw scores --tables <axis> --out @/scores", *(f"scores.{kind}" for kind in _DRAWN)
    ),
    "enrich": _stage(
        "enrich --scores <axis> --gene-sets planted=<sets.gmt> --spec {spec} --top 20 --truth <truth.csv>"
        " --out @/enrichment", "enrichment", spec=as_json(n_null=20, n_permutations=100),
    ),
    "axis pathways": _stage(
        "axis pathways --enrichment <enrichment> --out @/pathways", *(f"pathways.{kind}" for kind in _DRAWN)
    ),
    "judge": _stage(
        "judge --enrichment <enrichment> --gene-sets planted=<sets.gmt> --spec {spec} --out @/judgement",
        "judgement", spec=JUDGE,
    ),
    "axis judge": _stage(
        "axis judge --judgement <judgement> --out @/judge", *(f"judge.{kind}" for kind in _DRAWN)
    ),
    "gradients": _stage(
        "gradients <scvi> <cells.h5ad> --column disease --unperturbed {normal} --perturbed {disease} --n-cells 60"
        " --out @/asked", "asked", normal=NORMAL, disease=DISEASE,
    ),
}  # fmt: skip
"""Every verb that writes, in an order in which they can run."""


def invoke(arguments: Sequence[str]) -> Any:
    """Run a verb in this process."""
    from typer.testing import CliRunner

    from perturbed.cli import app

    return CliRunner().invoke(app, list(arguments))


def avoid_umap() -> None:
    """Draw maps on principal components: UMAP compiles for half a minute, and has nothing to do with files."""
    import perturbed.axis.maps as maps

    maps.project_by_umap = lambda z, start, end, seed: (z[:, :2], np.stack([start[:, :2], end[:, :2]]))  # type: ignore[assignment]


def build(world: Path) -> None:
    """Run every stage."""
    avoid_umap()
    for name, stage in STAGES.items():
        if name == "judge":
            answer_all(world)
        done = invoke(stage.arguments(world, world))
        assert done.exit_code == 0, (name, done.output, done.exception)
        missing = [output for output in stage.outputs if not (world / output).exists()]
        assert not missing, (name, missing)


class _EverySecond:
    """A judge in this process that finds every second question relevant."""

    server = "in process"

    def __init__(self) -> None:
        self.n_asked = 0

    def ask(self, messages: list[dict[str, str]], seed: int | None) -> Any:
        from perturbed.pathways.judge_providers import Reply

        self.n_asked += 1
        return Reply("answer", "yes" if self.n_asked % 2 else "no", 0.5, "so", "tiny", 10, 5, 0.1)


def answer_all(world: Path) -> None:
    """Write `answers.jsonl`, every answer that the stage `judge` replays."""
    from perturbed.pathways.judge import judge_pathways
    from perturbed.pathways.judge_spec import JudgeSpec

    asked = json.loads(JUDGE) | {"provider": "openai", "replay": None, "concurrency": 1}
    libraries, answers = {"planted": world / "sets.gmt"}, world / "answers.jsonl"
    judge_pathways(
        world / "enrichment", libraries, JudgeSpec(**asked), world / "asked", cache=answers, provider=_EverySecond()
    )
    shutil.rmtree(world / "asked")


def copy(source: Path, target: Path) -> Path:
    """A copy of a file or folder of the world, with its record."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    if record_path(source).is_file():
        shutil.copy2(record_path(source), record_path(target))
    return target


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file but provenance records, which hold times."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.endswith(".provenance.json")}
