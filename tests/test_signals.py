"""Asked to stop at any step, training saves, ends with the signal's code and resumes to the same bytes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perturbed import training
from perturbed.checkpoints import only_writer, previous_of, read_checkpoint, remove_checkpoints, write_checkpoint
from perturbed.interrupts import Stopped, heed_signals, postponed
from perturbed.models.base import FitRun
from perturbed.models.discrepancy_vae_module import condition_batches
from perturbed.training import History, Random, Task, seeded_weights, train
from perturbed.training_options import TrainingOptions


class Terms(NamedTuple):
    loss: Tensor
    noise: Tensor


OPTIONS = TrainingOptions(lr=0.02, lr_final=0.1, batch_size=8, epochs=5, patience=3)
N_STEPS = 5  # of an epoch: 40 training cells in batches of 8


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Trained(NamedTuple):
    module: nn.Module
    history: History | None
    rows: list[dict[str, float]]

    def bytes(self) -> bytes:
        return b"".join(value.numpy().tobytes() for value in self.module.state_dict().values())


def run(checkpoint: Path | None = None, stop_at: int | None = None, number: int = signal.SIGTERM, **task) -> Trained:
    """Train; in call `stop_at` of the loss (validation included) the process gets a signal."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(50, 4)).astype(np.float32))
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    with seeded_weights(0):
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 1))
    calls = 0

    def step(rows: np.ndarray, random: Random, epoch: int | None) -> Terms:
        nonlocal calls
        if calls == stop_at:
            os.kill(os.getpid(), number)
        calls += 1
        noise = torch.randn(len(rows), generator=random.torch) + float(random.numpy.normal())
        error = module(x[rows]).squeeze(1) - y[rows] - (0.05 * noise if epoch is not None else 0)
        return Terms(error.square().mean(), noise.mean())

    seen: list[dict[str, float]] = []
    given = Task(module, step, np.arange(40), np.arange(40, 50), "a", **task)
    how = FitRun(seed=1, checkpoint=checkpoint, history=lambda row: seen.append(dict(row)), progress=False)
    try:
        history = train(given, OPTIONS, how)
    except Stopped as stopped:
        assert stopped.number == number
        history = None
    return Trained(module, history, seen)


# first and middle step of an epoch, its last, the validation after it, and one epoch later
@pytest.mark.parametrize("stop_at", [0, 2, N_STEPS - 1, N_STEPS, N_STEPS + 1, 2 * (N_STEPS + 1) + 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_after_any_step_and_resumed_is_undisturbed_to_the_byte(tmp_path, stop_at, number):
    path = tmp_path / "checkpoint.pt"
    assert run(path, stop_at, number).history is None
    assert path.is_file()
    resumed, undisturbed = run(path), run()
    assert resumed.bytes() == undisturbed.bytes()
    assert resumed.rows == undisturbed.rows == resumed.history.epochs


def test_stopped_again_and_again(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for _ in range(8):
        assert run(path, stop_at=1).history is None
    assert run(path).bytes() == run().bytes()


def test_no_step_is_taken_twice(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    run(path, stop_at=N_STEPS + 1 + 2)
    taken = []
    add = training._add
    monkeypatch.setattr(training, "_add", lambda *a: taken.append(1) or add(*a))
    run(path)
    done = N_STEPS + 1 + 3
    assert len(taken) == OPTIONS.epochs * (N_STEPS + 1) - done


def test_batches_of_one_group_resume_too(tmp_path):
    path = tmp_path / "checkpoint.pt"
    batches = partial(condition_batches, np.repeat([0, 1, 2, 3, 4], 10))
    run(path, stop_at=2, batches=batches)
    assert run(path, batches=batches).bytes() == run(batches=batches).bytes() != run().bytes()


def test_a_kill_after_a_timed_checkpoint_within_an_epoch_resumes_there(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    written = []

    def dies(*arguments):
        write_checkpoint(*arguments)
        written.append(arguments[1])
        if len(written) == 3:
            raise MemoryError

    monkeypatch.setattr(training, "write_checkpoint", dies)
    with pytest.raises(MemoryError):
        run(path)
    assert written[-1]["begun"]["n_batches"] == 3
    monkeypatch.undo()
    assert run(path).bytes() == run().bytes()


def test_without_a_checkpoint_the_first_signal_stops_at_once():
    heed_signals()
    with pytest.raises(Stopped):
        training.train(
            Task(nn.Linear(1, 1), lambda *_: os.kill(os.getpid(), signal.SIGTERM), np.arange(4), np.arange(0)),
            OPTIONS, FitRun(progress=False),
        )  # fmt: skip


# --- signals ------------------------------------------------------------------------------------------------------


def test_a_second_ctrl_c_is_not_postponed_but_a_scheduler_may_repeat_itself():
    with pytest.raises(Stopped) as caught, postponed() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still here")
    assert caught.value.code == 130


def test_a_signal_that_the_body_overlooks_is_raised_after_it_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    reached = []
    with pytest.raises(Stopped), postponed():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(1)
    assert reached
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_trains_without_touching_signals():
    before, found = signal.getsignal(signal.SIGTERM), []

    def body():
        with postponed() as asked:
            found.append((asked(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(None, True)]


def test_cleaning_up_is_not_disturbed_by_a_second_request():
    heed_signals()
    with pytest.raises(Stopped) as caught:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.number == signal.SIGTERM
    heed_signals()
    with pytest.raises(Stopped), postponed():
        os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_program_ends_with_the_signals_code(number):
    code = (
        "import os, sys; from perturbed import cli\n"
        "@cli.app.command()\n"
        f"def hang(): os.kill(os.getpid(), {int(number)}); raise SystemExit('not stopped')\n"
        "sys.argv = ['perturbed', 'hang']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.startswith(f"perturbed: stopped by {signal.Signals(number).name}")
    assert done.stderr.count("\n") == 1


# --- files --------------------------------------------------------------------------------------------------------


def stopped_twice(path: Path) -> None:
    run(path, stop_at=2)
    run(path, stop_at=2)
    assert previous_of(path).is_file()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage):
    path = tmp_path / "checkpoint.pt"
    stopped_twice(path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights = run_weights(path)
        where = content.find(weights)
        assert where > 0
        content[where + 3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with caplog.at_level(logging.INFO, logger="perturbed"):
        resumed = run(path)
    assert resumed.bytes() == run().bytes()
    assert "resuming after step 3, in epoch 0" in caplog.text
    if damage != "gone":
        assert "taking the one before" in caplog.text


def run_weights(path: Path) -> bytes:
    return torch.load(path, weights_only=True)["module"]["0.weight"].numpy().tobytes()


def test_both_damaged_starts_afresh(tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    stopped_twice(path)
    for file in (path, previous_of(path)):
        file.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING, logger="perturbed"):
        assert run(path).bytes() == run().bytes()
    assert caplog.text.count("not a readable checkpoint") == 2
    assert "starting afresh" in caplog.text


def test_a_fit_leaves_no_checkpoint_behind(tmp_path):
    path = tmp_path / "checkpoint.pt"
    stopped_twice(path)
    remove_checkpoints(path)
    assert list(tmp_path.iterdir()) == []
    remove_checkpoints(path)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    tensors = {"a": {"b": torch.arange(3), "c": [torch.zeros(()), 0.1, None]}, "empty": torch.zeros(0, 2)}
    write_checkpoint(path, {"identity": "x", "state": {"big": 2**127}}, tensors)
    meta, found = read_checkpoint(path, "x")
    assert meta["state"]["big"] == 2**127
    assert torch.equal(found["a"]["b"], torch.arange(3))
    assert found["a"]["c"][1:] == [0.1, None]
    assert read_checkpoint(path, "y") is None


def test_two_fits_of_the_same_follow_one_another(tmp_path, caplog):
    path = tmp_path / "deep" / "checkpoint.pt"
    code = (
        "import sys, time; from pathlib import Path; from perturbed.checkpoints import only_writer\n"
        f"with only_writer(Path({str(path)!r})): print('in', flush=True); time.sleep(float(sys.argv[1])); print('out')"
    )
    first = subprocess.Popen([sys.executable, "-c", code, "2"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    with only_writer(path):
        assert first.stdout.read() == "out\n"  # it had ended, or this would wait for it
        assert first.wait() == 0
    assert caplog.text.count("another process is at this fit") == 1
    assert list(path.parent.iterdir()) == []


def test_the_lock_of_a_killed_fit_is_gone(tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    code = (
        "import os; from pathlib import Path; from perturbed.checkpoints import only_writer\n"
        f"with only_writer(Path({str(path)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt.lock"]
    with only_writer(path):
        pass
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == []
