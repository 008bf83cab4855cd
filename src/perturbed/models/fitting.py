"""The stages `fit` and `predict`: a method between the files of the pipeline."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.checkpoints import only_writer, remove_checkpoints
from perturbed.config import parse
from perturbed.data.contracts import read_split, write_prediction
from perturbed.data.ondisk import open_tables
from perturbed.data.tables import read_header
from perturbed.device import Device, choose_device
from perturbed.distributed import ALONE, current, launch, refuse_alone, started_by_torchrun
from perturbed.errors import LeakageError
from perturbed.files import atomic
from perturbed.models.base import FitRun, Method, MethodSpec, build, load_model, save_model
from perturbed.models.inputs import load_training_data
from perturbed.names import CONTROL

log = logging.getLogger(__name__)


def fit_model(
    spec: Mapping[str, Any],
    prepared: Path,
    split: Path,
    features: Path,
    out: Path,
    *,
    name: str = "",
    leakage: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int = 1,
    history: Path | None = None,
    checkpoint: Path | None = None,
    files: Mapping[str, Path] | None = None,
    memory_gb: float | None = None,
    processes: int = 1,
) -> Device:
    """Fit a method and save it; return the device it trained on, with the reason.

    `files` are the dataset's side files by role. Cells beyond `memory_gb` are read from disk while the method trains,
    where it can (`perturbed.data.streaming.memory_budget`). `processes` share each batch and, on the CPU, the threads
    (`perturbed.distributed`); those of torchrun do so unasked.

    Raises
    ------
    LeakageError
        If `leakage` is of another split.
    MethodError
        If the method cannot run on these data, or there is no such device.
    """
    method_spec = parse(MethodSpec, spec, "--method")
    method = build(method_spec)
    if current() is ALONE and (processes > 1 or started_by_torchrun()):
        refuse_alone(name or method_spec.title, method.parallel, max(2, processes))
        keywords = {
            "name": name, "leakage": leakage, "seed": seed, "device": device, "threads": max(1, threads // processes),
            "history": history, "checkpoint": checkpoint, "files": files, "memory_gb": memory_gb,
        }  # fmt: skip
        arguments = {"spec": spec, "prepared": prepared, "split": split, "features": features, "out": out, **keywords}
        return Device(*launch(fit_model, arguments, processes, device))
    where = _seed_everything(method, seed, device, threads)
    header = read_split(split).header
    _check_leakage_file(leakage, header, features)
    data = load_training_data(prepared, split, features, files, streams=method.streams, memory_gb=memory_gb)
    method.check(data)
    rows: list[dict[str, float]] = []
    run = FitRun(
        seed=seed, device=where.name, checkpoint=checkpoint, history=lambda row: rows.append(dict(row)), threads=threads
    )
    meta = {key: header.get(key) for key in ("dataset", "split", "fold", "sha256")}
    with only_writer(checkpoint if current().leads else None):
        method.fit(data, run)
        where = Device(where.name, "; ".join([where.reason, *run.notes]))
        if not current().leads:
            return where
        if history is not None:
            _write_history(history, rows, {**meta, "method": name or method_spec.title, "seed": seed})
        save_model(out, method, method_spec, {**meta, "seed": seed})
        if checkpoint is not None:
            remove_checkpoints(checkpoint)
    return where


def predict_split(
    model: Path, prepared: Path, split: Path, out: Path, *, method: str, seed: int = 0, threads: int = 1
) -> None:
    """Predict every test perturbation of a split; of the test cells only the names of their conditions are read."""
    fitted = load_model(model)
    _seed_everything(fitted, seed, "cpu", threads)
    frozen = read_split(split)
    test = frozen.table[(frozen.table["part"] == "test") & (frozen.table["perturbation"] != CONTROL)]
    context = open_tables(prepared).obs["context"].astype(str)
    pairs = pd.DataFrame({"perturbation": test["perturbation"], "context": context.reindex(test.index)})
    targets = sorted(set(map(tuple, pairs.to_numpy())))
    prediction = fitted.predict(targets, seed=seed)
    for name, reason in sorted(prediction.refused.items()):
        log.info("not predicted: %s (%s)", name, reason)
    header = frozen.header
    meta: dict[str, Any] = {key: header[key] for key in ("dataset", "split", "fold") if key in header}
    meta |= {"method": method, "seed": seed, "split_sha256": header.get("sha256")}
    write_prediction(out, replace(prediction, meta=meta))


def _check_leakage_file(leakage: Path | None, header: Mapping[str, Any], features: Path) -> None:
    if leakage is None:
        return
    try:
        known = json.loads(leakage.read_text())
        failed = [check["name"] for check in known.get("checks", ()) if not check["ok"]]
        proven = known.get("split_sha256"), known.get("features_sha256")
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        raise LeakageError(f"{leakage}: cannot be read; make it with `perturbed check-leakage`") from None
    if failed:
        raise LeakageError(f"{leakage}: the check {failed[0]!r} failed; remake split and features from these data")
    if proven[0] != header.get("sha256"):
        raise LeakageError(f"{leakage}: proves another split than this one; rerun `perturbed check-leakage`")
    if proven[1] != read_header(features).get("sha256"):
        raise LeakageError(f"{leakage}: proves other features than {features}; rerun `perturbed check-leakage`")


def _seed_everything(method: Method, seed: int, device: str, threads: int) -> Device:
    """Seed the global generators too, in case a library draws from them; return the device to use.

    torch is left alone where nothing has imported it: that would take longer than a baseline takes to fit.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if not method.uses_torch and "torch" not in sys.modules:
        return Device("cpu", "the method needs no other")
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    return choose_device(device)


def _write_history(path: Path, rows: list[dict[str, float]], meta: Mapping[str, Any]) -> None:
    """Write the loss terms by epoch as a long table; empty but with its header for methods that do not train."""
    long = [(row["epoch"], term, value) for row in rows for term, value in row.items() if term != "epoch"]
    table = pd.DataFrame(long, columns=["epoch", "term", "value"]).astype({"epoch": int})
    for key in ("seed", "method", "fold", "split", "dataset"):
        table.insert(0, key, meta.get(key))
    with atomic(path) as part:
        table.to_csv(part, index=False, float_format="%.9g", lineterminator="\n")
