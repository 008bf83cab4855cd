"""Training in two processes is training in one, up to the rounding of sums; and it ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perturbed import distributed, training
from perturbed.distributed import ALONE, Group, current, device_of, launch, started_by_torchrun
from perturbed.errors import DataError, MethodError
from perturbed.models.base import FitRun
from perturbed.training import Random, Task, seeded_weights, train
from perturbed.training_options import TrainingOptions

HERE = str(Path(__file__).parent)


class Terms(NamedTuple):
    loss: Tensor
    noise: Tensor


def make_task(n_train=50, n_val=11, parallel=True, spoil: dict | None = None) -> Task:
    """Regression with noise from both generators, drawn for the whole batch; batches of 8, so the last holds 2."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(n_train + n_val, 4)).astype(np.float32))
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    with seeded_weights(0):
        module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    steps = [0]

    def step(rows: np.ndarray, random: Random, epoch: int | None) -> Terms:
        steps[0] += 1
        if spoil and spoil["rank"] == random.group.rank and steps[0] == spoil["step"]:
            spoil_now(spoil["how"])
        jitter = torch.randn(len(rows), generator=random.torch) + torch.from_numpy(random.numpy.normal(size=len(rows)))
        own = random.share(len(rows))
        rows, jitter = rows[own], jitter[own].float()
        error = module(x[rows]).squeeze(1) - y[rows] - (0.05 * jitter if epoch is not None else 0)
        return Terms(error.square().mean(), jitter.mean())

    return Task(module, step, np.arange(n_train), np.arange(n_train, n_train + n_val), "a", parallel=parallel)


def spoil_now(how: str) -> None:
    if how == "error":
        raise DataError("cells.h5ad: broken; mend it")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)


def run_toy(folder: str = "", spoil: dict | None = None, parallel: bool = True, **options) -> dict:
    """What a process of the tests does; every one writes what it ended with."""
    training.CHECKPOINT_SECONDS = 0.0
    task = make_task(spoil=spoil, parallel=parallel)
    seen = []
    checkpoint = Path(folder) / "checkpoint.pt" if folder else None
    run = FitRun(seed=3, progress=False, checkpoint=checkpoint, history=lambda row: seen.append(dict(row)))
    history = train(task, TrainingOptions(**{"lr": 0.02, "batch_size": 8, "epochs": 4, **options}), run)
    weights = {key: value.tolist() for key, value in task.module.state_dict().items()}
    found = {"epochs": history.epochs, "seen": seen, "weights": weights, "best": history.best_epoch}
    if folder:
        (Path(folder) / f"rank{current().rank}.json").write_text(json.dumps(found))
    return found


def assert_near(ours: dict, theirs: dict, rtol: float = 1e-5) -> None:
    assert len(ours["epochs"]) == len(theirs["epochs"])
    for row, other in zip(ours["epochs"], theirs["epochs"]):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == pytest.approx(other[key], rel=rtol, abs=1e-6), key
    for key, value in ours["weights"].items():
        np.testing.assert_allclose(value, theirs["weights"][key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_loss_is_that_of_one_process(tmp_path, processes):
    alone = run_toy(weight_decay=0.1, patience=1)
    found = launch(run_toy, {"folder": str(tmp_path), "weight_decay": 0.1, "patience": 1}, processes)
    assert_near(found, alone)
    assert found["best"] == alone["best"]
    every = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert all(other["weights"] == every[0]["weights"] for other in every)  # to the bit
    assert all(other["seen"] == every[0]["seen"] for other in every)


def test_without_a_share_of_the_draws_the_loss_would_differ():
    """The tolerance is sharp: another seed of the noise is far outside of it."""
    alone, other = run_toy(), run_toy(batch_size=7)
    with pytest.raises(AssertionError):
        assert_near(other, alone)


def test_a_stopped_run_resumes_in_several_processes_and_in_one(tmp_path):
    run_toy(folder=str(tmp_path), epochs=4, max_steps=10)
    assert (tmp_path / "checkpoint.pt").is_file()
    alone = run_toy(max_steps=10)
    found = launch(run_toy, {"folder": str(tmp_path), "max_steps": 10}, 2)
    assert found["epochs"] == alone["epochs"]  # nothing was left to do
    for path in tmp_path.glob("checkpoint*"):
        path.unlink()
    launch(run_toy, {"folder": str(tmp_path), "max_steps": 20}, 2)
    names = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint.pt", "checkpoint.pt.previous"]  # of one process only


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", DataError, "^cells.h5ad: broken; mend it$"),
        ("bug", MethodError, "process {rank} of 2 failed: ZeroDivisionError: a bug"),
        ("kill", MethodError, "process {rank} of 2 was ended by SIGKILL; if memory ran out"),
    ],
)
def test_one_that_fails_ends_all_in_one_line(capfd, rank, how, kind, message):
    with pytest.raises(kind, match=message.format(rank=rank)) as error:
        launch(run_toy, {"spoil": {"rank": rank, "step": 3, "how": how}}, 2)
    assert "\n" not in str(error.value)
    shown = capfd.readouterr().err
    assert ("ZeroDivisionError" in shown) == (how == "bug")
    assert "Connection" not in shown and "peer" not in shown


def test_what_trains_in_one_process_says_so():
    with pytest.raises(MethodError, match="trains in one process, 2 were asked for"):
        launch(run_toy, {"parallel": False}, 2)


STOP = """
import sys; sys.path.insert(0, {here!r})
import test_distributed as t
from perturbed.distributed import launch
from perturbed.interrupts import Stopped, heed_signals
if __name__ == "__main__":
    heed_signals()
    try:
        launch(t.run_toy, {{"folder": {folder!r}, "epochs": 100000, "spoil": {{"rank": 1, "step": -1, "how": ""}}}}, 2)
    except Stopped as stop:
        sys.exit(stop.code)
"""


def test_a_signal_ends_all_after_the_same_step_with_a_checkpoint(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(STOP.format(here=HERE, folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (tmp_path / "checkpoint.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 143, shown
    assert "saved after" in shown
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert json.loads(content["meta"])["steps"] > 0


def test_a_scheduler_s_variables_start_nothing(monkeypatch):
    for key, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    assert not started_by_torchrun() and current() is ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert started_by_torchrun()


def test_shares_make_up_the_batch():
    for n in (1, 2, 3, 7, 64):
        groups = [Group(rank, 3) for rank in range(3)]
        rows = np.arange(n)
        counted = np.concatenate([rows[group.share(n)] for group in groups if group.weight(n) > 0])
        np.testing.assert_array_equal(counted, rows)
        assert sum(group.weight(n) for group in groups) == pytest.approx(1)
        for group in groups:
            own = rows[group.share(n)]
            assert len(own) >= 1  # a step on no rows would have no mean
            assert group.weight(n) in (0, pytest.approx(len(own) / n))


def test_one_process_is_left_alone():
    terms = Terms(torch.tensor(1.0), torch.tensor(2.0))
    assert ALONE.combine(terms, 5) is terms and ALONE.share(9) == slice(0, 9)
    ALONE.check_same("data", 1)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of("auto", rank, 2) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert device_of("cpu", 1, 2) == "cpu"
    with pytest.raises(MethodError, match="3 on a machine with 2"):
        device_of("cuda", 0, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of("auto", 1, 2) == "cpu"


def disagree() -> None:
    current().check_same("data", current().rank)


def test_other_data_in_one_process_are_noticed():
    with pytest.raises(MethodError, match="2 processes do not hold the same data"):
        launch(disagree, {}, 2)
    assert distributed.current() is ALONE
