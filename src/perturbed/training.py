"""The one training loop of all torch models: seeded, early-stopping, and exact when resumed.

A model hands over a `Task`: its module, the rows to train and validate on, and a function from rows to the terms of
the loss. Everything random is drawn from the two generators the loop owns, so that its checkpoint holds all there is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbed.checkpoints import checksum, read_checkpoint, write_checkpoint
from perturbed.distributed import ALONE, Group, current, refuse_alone
from perturbed.errors import MethodError
from perturbed.files import sha256_text
from perturbed.interrupts import Stopped, postponed
from perturbed.models.nn.mlp import MLP
from perturbed.models.nn.schedules import fall_linearly
from perturbed.training_options import TrainingOptions

if TYPE_CHECKING:
    from perturbed.models.base import FitRun

log = logging.getLogger(__name__)

COMPILE_BACKEND = "inductor"
"""What `compile: true` compiles with."""
CHECKPOINT_SECONDS = float(os.environ.get("PERTURBED_CHECKPOINT_SECONDS", "20"))
"""A checkpoint is written after a step when the last one is older than this."""


@dataclass(frozen=True)
class Random:
    """The generators of a run."""

    numpy: np.random.Generator
    """For the order of cells, partners and subsets."""
    torch: torch.Generator
    """For draws on the device."""
    group: Group = ALONE
    """The processes that draw the same and share the rows of every batch."""

    @classmethod
    def seeded(cls, seed: int, stream: int, device: str = "cpu", group: Group = ALONE) -> Random:
        """Generators of an independent stream of `seed`."""
        generator = torch.Generator(device)
        generator.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]))
        return cls(np.random.default_rng([seed, stream]), generator, group)

    def share(self, n: int) -> slice:
        """Rows of a batch of `n` that this process computes, after drawing for all: every one where it is alone."""
        return self.group.share(n)


Step = Callable[[np.ndarray, Random, int | None], Any]
"""From rows, generators and epoch to a NamedTuple of scalar tensors, the first named `loss`. The epoch is None for
validation, which takes the weights that hold after warm-up."""


Batches = Callable[[np.ndarray, int, np.random.Generator], Iterator[np.ndarray]]
"""From training rows, batch size and generator to the rows of each batch of one epoch. All draws come from the
generator, and before the first batch, so that a run resumed within an epoch takes the same batches."""


@dataclass(frozen=True)
class Task:
    """What is trained."""

    module: nn.Module
    """On its device already."""
    step: Step
    """One batch of the loss; called under `no_grad` for validation."""
    train_rows: np.ndarray
    """Rows of the training cells."""
    val_rows: np.ndarray
    """Rows of the validation cells; may be empty."""
    fingerprint: str = ""
    """Identifies data and hyper-parameters; a checkpoint of another one is not resumed."""
    batches: Batches | None = None
    """The rows of every batch of one epoch; None takes the training rows in random order."""
    parallel: bool = False
    """Whether `step` draws for all rows and computes those of `random.share`, as training in several processes needs;
    its terms are then averages over that share."""


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Make the initial weights of modules built inside a function of `seed`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, 0x1417]).generate_state(1, np.uint64)[0] >> 1))
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False  # costs a pass over memory and changes no result
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fill


@contextmanager
def _compiled(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Compile the multilayer perceptrons of `module` in place; weights and their names stay as they are."""
    nets = [child for child in module.modules() if isinstance(child, MLP)] if wanted else []
    for net in nets:
        net.compile(backend=COMPILE_BACKEND, dynamic=True)
    try:
        yield
    finally:
        for net in nets:
            net._compiled_call_impl = None


def dense_rows(matrix: sparse.csr_matrix, rows: np.ndarray, device: str = "cpu") -> Tensor:
    """Some rows of a CSR matrix as a dense float32 tensor."""
    return torch.from_numpy(np.asarray(matrix[rows].toarray(), dtype=np.float32)).to(device)


class History(NamedTuple):
    """The result of a training run."""

    epochs: list[dict[str, float]]
    """Terms of the loss of every epoch."""
    best_epoch: int | None
    """Epoch whose weights were kept, where early stopping chose."""


def train(task: Task, options: TrainingOptions, run: FitRun) -> History:
    """Train `task.module` in place with Adam.

    Resumes from `run.checkpoint` where that holds a checkpoint of the same task; the outcome is then the same, to the
    byte, as without the interruption, and `run.history` is called for the epochs before it, too. From a checkpoint of
    another kind of device it goes on with new draws and says so in `run.notes`. A signal to stop is answered after the
    step at hand, with a checkpoint. The caller removes it (`checkpoints.remove_checkpoints`) once the model is saved.

    Raises
    ------
    MethodError
        If the loss is no longer finite, there are no training cells, or the task does not train in several processes.
    Stopped
        If a signal asked to stop and `run.checkpoint` is given; what was done is in the checkpoint.
    """
    if not len(task.train_rows):
        raise MethodError("no training cells; loosen the split's fractions")
    refuse_alone("this method", task.parallel, current().size)
    loop = _Loop(task, options, run)
    with _deterministic(), _compiled(task.module, options.compile), postponed(run.checkpoint is not None) as loop.asked:
        loop.asked = loop.group.agree_on(loop.asked)
        loop.resume()
        loop.group.check_same("data, options or checkpoint", loop._identity, loop.steps)
        loop.run_epochs()
    return History(loop.epochs, loop.best_epoch)


@dataclass
class _Begun:
    """What is done of the epoch at hand: enough to go on after any of its batches."""

    start: Mapping[str, Any]
    """State of the numpy generator before the epoch's batches were drawn."""
    n_batches: int = 0
    n_cells: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    """Sums of the terms of the loss over cells, float64."""


class _Loop:
    """State and steps of one training run."""

    def __init__(self, task: Task, options: TrainingOptions, run: FitRun) -> None:
        self.task, self.options, self.run = task, options, run
        self.group = current()
        self.random = Random.seeded(run.seed, 1, run.device, self.group)
        if not self.group.leads:
            self._save = lambda: None  # type: ignore[method-assign]
        self.optimiser = torch.optim.AdamW(
            [p for p in task.module.parameters() if p.requires_grad],
            lr=options.lr,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.epochs: list[dict[str, float]] = []
        self.steps = 0
        self.best: dict[str, Tensor] = {}
        self.best_epoch: int | None = None
        self.begun: _Begun | None = None
        self.saved_at = time.monotonic()
        self.asked: Callable[[], int | None] = lambda: None

    # --- epochs -----------------------------------------------------------------------------------------------------

    def run_epochs(self) -> None:
        from tqdm import tqdm

        shown = self.run.progress and sys.stderr.isatty()
        with tqdm(
            total=self.options.epochs, initial=len(self.epochs), disable=not shown, file=sys.stderr, unit="epoch"
        ) as bar:
            while not self.finished:
                row = self._one_epoch(len(self.epochs))
                self._pause()
                bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                bar.update()
                if self.run.history is not None:
                    self.run.history(row)
        if self.best:
            self.task.module.load_state_dict(self.best)

    @property
    def finished(self) -> bool:
        """Whether the epochs, the steps or the patience are used up."""
        options, n_done = self.options, len(self.epochs)
        stale = options.patience is not None and self.best_epoch is not None and n_done >= options.min_epochs
        return (
            n_done >= options.epochs
            or (options.max_steps is not None and self.steps >= options.max_steps)
            or (stale and n_done - 1 - self.best_epoch >= options.patience)  # type: ignore[operator]
        )

    def _one_epoch(self, epoch: int) -> dict[str, float]:
        row = {"epoch": float(epoch), **self._train_epoch(epoch)}
        if len(self.task.val_rows):
            row |= {f"val_{key}": value for key, value in self._validate().items()}
        if not all(math.isfinite(value) for value in row.values()):
            raise MethodError(f"training diverged in epoch {epoch} (loss {row['loss']}); lower `lr`")
        self.epochs.append(row)
        self.begun = None
        if self.options.patience is not None and "val_loss" in row:
            best = math.inf if self.best_epoch is None else self.epochs[self.best_epoch]["val_loss"]
            if row["val_loss"] < best:
                self.best_epoch = epoch
                self.best = {key: value.clone() for key, value in self.task.module.state_dict().items()}
        return row

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.run.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.task.module.train()
        self.group.align(self.task.module)
        for group in self.optimiser.param_groups:
            group["lr"] = fall_linearly(epoch, self.options.epochs, self.options.lr, self.options.lr_final)
        begun, batches = self._take_up_epoch()
        for rows in batches:
            if self.options.max_steps is not None and self.steps >= self.options.max_steps:
                break
            self.optimiser.zero_grad(set_to_none=True)
            with self._autocast():
                terms = self.task.step(rows, self.random, epoch)
            terms.loss.backward()
            terms = self.group.combine(terms, len(rows), self.task.module.parameters())
            self.optimiser.step()
            self.steps += 1
            begun.n_batches += 1
            begun.n_cells += len(rows)
            _add(begun.totals, terms, len(rows))
            self._pause()
        return {key: float(value) / begun.n_cells for key, value in begun.totals.items()}

    def _take_up_epoch(self) -> tuple[_Begun, Iterator[np.ndarray]]:
        """What is done of the epoch, and its remaining batches: all of them but after a resume."""
        rng = self.random.numpy
        draw = self.task.batches or _permuted
        if self.begun is None:
            self.begun = _Begun(rng.bit_generator.state)
            return self.begun, draw(self.task.train_rows, self.options.batch_size, rng)
        now = rng.bit_generator.state
        rng.bit_generator.state = self.begun.start
        batches = draw(self.task.train_rows, self.options.batch_size, rng)
        for _ in range(self.begun.n_batches):
            next(batches)
        rng.bit_generator.state = now
        return self.begun, batches

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Terms on the validation cells, with the same draws in every epoch, so that epochs can be compared."""
        self.task.module.eval()
        random = Random.seeded(self.run.seed, 2, self.run.device, self.group)
        totals: dict[str, Any] = {}
        size = max(self.options.batch_size, 256)
        for start in range(0, len(self.task.val_rows), size):
            rows = self.task.val_rows[start : start + size]
            with self._autocast():
                terms = self.group.combine(self.task.step(rows, random, None), len(rows))
            _add(totals, terms, len(rows))
            self._pause()
        return {key: float(value) / len(self.task.val_rows) for key, value in totals.items()}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        shapes = {key: list(value.shape) for key, value in self.task.module.state_dict().items()}
        split = [checksum(rows) for rows in (self.task.train_rows, self.task.val_rows)]
        options = self.options.model_dump(include=set(TrainingOptions.model_fields))
        parts = [self.task.fingerprint, shapes, split, options, self.run.seed]
        return sha256_text(json.dumps(parts, sort_keys=True))

    def _pause(self) -> None:
        """Between two steps: write a checkpoint if the last is old, or if a signal asks to stop, and then stop."""
        if self.run.checkpoint is None:
            return
        asked = self.asked()
        if asked is not None:
            self._save()
            log.info("%s: saved after %d steps; the same command resumes there", self.run.checkpoint, self.steps)
            raise Stopped(asked)
        if time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self._save()

    def _save(self) -> None:
        assert self.run.checkpoint is not None
        begun = self.begun
        meta = {
            "identity": self._identity,
            "device": torch.device(self.run.device).type,
            "epochs": self.epochs,
            "steps": self.steps,
            "best_epoch": self.best_epoch,
            "numpy": self.random.numpy.bit_generator.state,
            "begun": begun and {"start": begun.start, "n_batches": begun.n_batches, "n_cells": begun.n_cells},
        }
        tensors = {
            "module": self.task.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "totals": begun.totals if begun else {},
            "torch": self.random.torch.get_state(),
        }
        write_checkpoint(self.run.checkpoint, meta, tensors)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Take up the checkpoint, if there is a usable one of this task; else start afresh."""
        if self.run.checkpoint is None:
            return
        found = read_checkpoint(self.run.checkpoint, self._identity)
        if found is not None:
            self._restore(*found)
        else:
            log.info("training from the start; checkpoints go to %s", self.run.checkpoint)

    def _restore(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        device = self.run.device
        self.task.module.load_state_dict(tensors["module"])
        self.optimiser.load_state_dict(tensors["optimiser"])
        self.best = {key: value.to(device) for key, value in tensors["best"].items()}
        self._restore_draws(meta["device"], meta["steps"], tensors["torch"])
        self.random.numpy.bit_generator.state = meta["numpy"]
        self.epochs, self.steps, self.best_epoch = list(meta["epochs"]), meta["steps"], meta["best_epoch"]
        if meta["begun"] is not None:
            self.begun = _Begun(**meta["begun"], totals={k: v.to(device) for k, v in tensors["totals"].items()})
        log.info("%s: resuming after step %d, in epoch %d", self.run.checkpoint, self.steps, len(self.epochs))
        if self.run.history is not None:
            for row in self.epochs:
                self.run.history(row)

    def _restore_draws(self, device: str, steps: int, state: Tensor) -> None:
        """Take up the generator's state, which another kind of device cannot: there it is seeded anew."""
        if device == torch.device(self.run.device).type:
            self.random.torch.set_state(state)
            return
        self.random.torch.manual_seed(int(np.random.SeedSequence([self.run.seed, 1, steps]).generate_state(1)[0]))
        self.run.notes.append(f"from step {steps} of a checkpoint of {device}: not the bytes of a fit on one device")
        log.warning("%s: %s", self.run.checkpoint, self.run.notes[-1])


def _permuted(rows: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    order = rng.permutation(rows)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _add(totals: dict[str, Any], terms: Any, weight: int) -> None:
    for name, value in terms._asdict().items():
        totals[name] = totals.get(name, 0.0) + value.detach().double() * weight
