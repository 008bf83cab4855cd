from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbed import training
from perturbed.checkpoints import previous_of, read_checkpoint, write_checkpoint
from perturbed.errors import MethodError
from perturbed.models.base import FitRun
from perturbed.models.nn.mlp import build_mlp
from perturbed.training import Random, Task, dense_rows, seeded_weights, train
from perturbed.training_options import TrainingOptions


class Terms(NamedTuple):
    loss: Tensor
    noise: Tensor


@pytest.fixture(autouse=True)
def checkpoint_every_epoch(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # with a checkpoint after every step, the disk would rule


def make_task(n_train=40, n_val=10, fingerprint="a", target=None) -> Task:
    """Regression with noise from both generators, so that each must be restored for a resumed run to agree."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(n_train + n_val, 4)).astype(np.float32))
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) if target is None else target
    with seeded_weights(0):
        module = nn.Linear(4, 1)

    def step(rows: np.ndarray, random: Random, epoch: int | None) -> Terms:
        jitter = torch.randn(len(rows), generator=random.torch) + float(random.numpy.normal())
        error = module(x[rows]).squeeze(1) - y[rows] - (0.05 * jitter if epoch is not None else 0)
        return Terms(error.square().mean(), jitter.mean())

    return Task(module, step, np.arange(n_train), np.arange(n_train, n_train + n_val), fingerprint)


OPTIONS = TrainingOptions(lr=0.02, batch_size=8, epochs=12, patience=4)


def weights(task: Task) -> bytes:
    return b"".join(value.numpy().tobytes() for value in task.module.state_dict().values())


def run_through(options=OPTIONS, **how) -> tuple[bytes, list]:
    task = make_task()
    history = train(task, options, FitRun(progress=False, **how))
    return weights(task), history.epochs


class Interrupted(Exception):
    pass


def interrupt_after(epoch: int, path: Path, options=OPTIONS, kind: type[BaseException] = Interrupted) -> None:
    def stop(row):
        if row["epoch"] == epoch:
            raise kind

    with pytest.raises(kind):
        train(make_task(), options, FitRun(checkpoint=path, history=stop, progress=False))
    assert path.is_file()


def test_the_loss_falls_and_the_map_is_learned():
    task = make_task()
    history = train(task, TrainingOptions(lr=0.05, batch_size=8, epochs=60), FitRun(progress=False))
    assert history.epochs[-1]["loss"] < 0.1 * history.epochs[0]["loss"]
    np.testing.assert_allclose(task.module.weight.detach()[0].numpy(), [1, -2, 0.5, 0], atol=0.1)


def test_same_seed_same_bytes_other_seed_others():
    assert run_through(seed=3) == run_through(seed=3)
    assert run_through(seed=3)[0] != run_through(seed=4)[0]


def test_the_global_generators_have_no_say():
    torch.manual_seed(1)
    first = run_through()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert run_through() == first
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("epoch", [0, 3, 10])
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_byte(tmp_path, epoch, kind):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(epoch, path, kind=kind)
    seen: list[dict] = []
    task = make_task()
    history = train(task, OPTIONS, FitRun(checkpoint=path, history=lambda row: seen.append(dict(row)), progress=False))
    expected_weights, expected_history = run_through()
    assert weights(task) == expected_weights
    assert history.epochs == seen == expected_history


def test_resuming_does_not_repeat_epochs(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(5, path)
    epochs = []
    original = training._Loop._train_epoch
    monkeypatch.setattr(training._Loop, "_train_epoch", lambda self, e: epochs.append(e) or original(self, e))
    train(make_task(), OPTIONS, FitRun(checkpoint=path, progress=False))
    assert epochs[0] == 6


def test_a_checkpoint_holds_tensors_and_text_only(tmp_path):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(2, path)
    assert "meta" in torch.load(path, weights_only=True)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_a_broken_checkpoint_starts_afresh_with_a_warning(tmp_path, caplog, damage):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(3, path)
    previous_of(path).unlink()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    else:
        torch.save({"something": torch.zeros(2)}, path)
    task = make_task()
    with caplog.at_level(logging.WARNING, logger="perturbed"):
        train(task, OPTIONS, FitRun(checkpoint=path, progress=False))
    assert "starting afresh" in caplog.text
    assert weights(task) == run_through()[0]


@pytest.mark.parametrize("change", ["data", "seed", "options"])
def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path, caplog, change):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(3, path)
    task = make_task(fingerprint="b" if change == "data" else "a")
    options = OPTIONS.model_copy(update={"lr": 0.01}) if change == "options" else OPTIONS
    with caplog.at_level(logging.WARNING, logger="perturbed"):
        train(task, options, FitRun(seed=int(change == "seed"), checkpoint=path, progress=False))
    assert "other data or hyper-parameters" in caplog.text


def test_a_checkpoint_of_a_gpu_is_gone_on_with_on_the_cpu_which_is_said(tmp_path, monkeypatch, caplog):
    path = tmp_path / "checkpoint.pt"
    interrupt_after(3, path)
    content = torch.load(path, weights_only=True)
    meta = json.loads(content["meta"])
    found = read_checkpoint(path, meta["identity"])
    assert found is not None
    write_checkpoint(path, meta | {"device": "cuda"}, found[1] | {"torch": torch.zeros(16, dtype=torch.uint8)})
    run = FitRun(checkpoint=path, progress=False)
    with caplog.at_level(logging.WARNING, logger="perturbed"):
        history = train(make_task(), OPTIONS, run)
    assert run.notes == ["from step 20 of a checkpoint of cuda: not the bytes of a fit on one device"]
    assert run.notes[0] in caplog.text
    whole = run_through()[1]
    assert history.epochs[:4] == whole[:4]
    assert history.epochs[4] != whole[4]


def test_checkpoints_keep_their_distance_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e6)
    train(make_task(), OPTIONS, FitRun(checkpoint=tmp_path / "checkpoint.pt", progress=False))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_early_stopping_keeps_the_best_weights_and_stops_in_time():
    # validation targets contradict the training targets, so that the validation loss rises from the start
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    y = torch.from_numpy(x @ np.array([3, 3, 3, 3], dtype=np.float32))
    y[40:] *= -1
    kept: list[bytes] = []
    task = make_task(target=y)
    options = TrainingOptions(lr=0.05, batch_size=8, epochs=50, patience=3)
    history = train(task, options, FitRun(progress=False, history=lambda row: kept.append(weights(task))))
    losses = [row["val_loss"] for row in history.epochs]
    assert history.best_epoch == int(np.argmin(losses))
    assert len(losses) == history.best_epoch + 1 + 3
    assert weights(task) == kept[history.best_epoch]


def test_without_patience_the_last_weights_are_kept_and_without_validation_none_is_needed():
    kept: list[bytes] = []
    task = make_task()
    options = TrainingOptions(lr=0.02, batch_size=8, epochs=6)
    history = train(task, options, FitRun(progress=False, history=lambda row: kept.append(weights(task))))
    assert (len(history.epochs), history.best_epoch) == (6, None)
    assert weights(task) == kept[-1]
    history = train(make_task(n_val=0), OPTIONS, FitRun(progress=False))
    assert len(history.epochs) == OPTIONS.epochs
    assert not any(key.startswith("val_") for key in history.epochs[0])


def test_validation_uses_the_same_draws_in_every_epoch():
    _, epochs = run_through(TrainingOptions(lr=1e-12, batch_size=8, epochs=3))
    assert len({row["val_noise"] for row in epochs}) == 1
    assert len({row["noise"] for row in epochs}) == 3


def test_max_steps_ends_within_an_epoch():
    calls = []
    task = make_task()
    counted = Task(task.module, lambda *a: calls.append(1) or task.step(*a), task.train_rows, np.zeros(0, int), "")
    train(counted, TrainingOptions(batch_size=8, epochs=99, max_steps=7), FitRun(progress=False))
    assert len(calls) == 7


def test_every_training_row_is_used_once_an_epoch():
    seen: list[int] = []
    task = make_task(n_val=0)

    def step(rows, random, epoch):
        seen.extend(rows)
        return task.step(rows, random, epoch)

    train(Task(task.module, step, task.train_rows, task.val_rows), TrainingOptions(batch_size=7, epochs=1), FitRun())
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)


def test_terms_are_averaged_over_cells_not_batches():
    task = make_task(n_train=10, n_val=0)
    zero = lambda: task.module.weight.sum() * 0  # noqa: E731
    still = Task(task.module, lambda rows, *_: Terms(zero() + rows.mean(), zero()), *task_rows(task))
    history = train(still, TrainingOptions(batch_size=8, epochs=1), FitRun(progress=False))
    assert history.epochs[0]["loss"] == pytest.approx(4.5)


def test_divergence_is_one_line():
    task = make_task()
    broken = Task(task.module, lambda *a: Terms(task.module.weight.sum() * math.nan, torch.zeros(())), *task_rows(task))
    with pytest.raises(MethodError, match=r"diverged in epoch 0 .* lower `lr`"):
        train(broken, OPTIONS, FitRun(progress=False))


def task_rows(task: Task) -> tuple[np.ndarray, np.ndarray]:
    return task.train_rows, task.val_rows


def test_no_training_cells_is_one_line():
    with pytest.raises(MethodError, match="no training cells"):
        train(make_task(n_train=0), OPTIONS, FitRun(progress=False))


def test_the_deterministic_mode_of_torch_is_put_back():
    run_through()
    assert not torch.are_deterministic_algorithms_enabled()


def test_nothing_is_printed_where_stderr_is_no_terminal(capsys):
    train(make_task(), OPTIONS, FitRun(progress=True))
    assert capsys.readouterr() == ("", "")


def test_dense_rows():
    matrix = sparse.random(6, 5, 0.5, "csr", dtype=np.float32, random_state=0)
    found = dense_rows(matrix, np.array([5, 1]))
    np.testing.assert_array_equal(found.numpy(), matrix.toarray()[[5, 1]])
    assert found.dtype == torch.float32


# --- precision and compilation ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build_mlp((4, 16, 1), "tanh")


def train_net(**options) -> tuple[list[dict], Task, list[torch.dtype]]:
    base = make_task()
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(50, 4)).astype(np.float32))
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    with seeded_weights(0):
        module = Net()
    inside: list[torch.dtype] = []
    module.net[0].register_forward_hook(lambda *a: inside.append(a[2].dtype))

    def step(rows: np.ndarray, random: Random, epoch: int | None) -> Terms:
        found = module.net(x[rows])
        assert found.dtype == torch.float32  # what leaves a net is as precise as what entered
        error = found.squeeze(1) - y[rows]
        return Terms(error.square().mean(), error.mean())

    task = Task(module, step, base.train_rows, base.val_rows)
    history = train(task, TrainingOptions(lr=0.02, batch_size=8, epochs=15, **options), FitRun(progress=False))
    return history.epochs, task, inside


def test_bfloat16_multiplies_in_bfloat16_and_learns_the_same():
    full, _, inside = train_net()
    half, halved, inside_half = train_net(precision="bfloat16")
    assert set(inside) == {torch.float32}
    assert set(inside_half) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in halved.module.parameters())
    assert half != full
    assert half[-1]["loss"] < 0.2 * half[0]["loss"]
    assert half[-1]["val_loss"] == pytest.approx(full[-1]["val_loss"], rel=0.1, abs=0.02)


def test_compiled_layers_agree_and_leave_no_trace(monkeypatch):
    used = []

    def backend(graph, inputs):
        used.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(training, "COMPILE_BACKEND", backend)
    plain, task, _ = train_net()
    compiled, other, _ = train_net(compile=True)
    assert used
    for here, there in zip(plain, compiled):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
    assert list(other.module.state_dict()) == list(task.module.state_dict())
    assert other.module.net._compiled_call_impl is None
