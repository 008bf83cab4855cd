"""Training in several processes: each takes its share of every batch, and gradients are averaged.

Every process draws the same random numbers for the whole batch and computes its share of the rows, so that the sum over
processes is the batch of a single one, up to the rounding of sums. The first process (rank 0) alone writes files.

Processes exist only where they were asked for: by `launch` (`perturbed fit --processes N`, one machine) or by torchrun
(several machines). Variables of a scheduler start nothing. This module imports torch only where processes are used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue as queues
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perturbed import errors
from perturbed.errors import MethodError, PerturbedError
from perturbed.interrupts import Stopped

if TYPE_CHECKING:
    from torch import nn

GRACE_SECONDS = 60.0
"""How long processes that are asked to stop may take to write their checkpoint."""
_POLL_SECONDS = 0.2
_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun and by nothing else."""


@dataclass(eq=False)
class Group:
    """The processes that train together, seen from one of them; the default is a process alone."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    asked: Callable[[], int | None] = lambda: None
    """The signal by which whoever started the processes asks them to stop, or None."""
    _agreed: int | None = field(default=None, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Rows of a batch of `n` that this process computes; never empty, though it may count nothing."""
        start, stop = n * self.rank // self.size, n * (self.rank + 1) // self.size
        return slice(start, stop) if stop > start else slice(0, min(1, n))

    def weight(self, n: int) -> float:
        """What the share counts of the batch: its part of the rows. The weights of all processes sum to 1."""
        return (n * (self.rank + 1) // self.size - n * self.rank // self.size) / n

    def agree_on(self, asked: Callable[[], int | None]) -> Callable[[], int | None]:
        """From what this process was asked to what all agree on, so that they stop after the same step."""
        if self.size == 1:
            return asked
        outside = self.asked
        self.asked = lambda: asked() or outside()
        return lambda: self._agreed

    def combine(self, terms: Any, n: int, parameters: Iterable[nn.Parameter] = ()) -> Any:
        """Average loss terms and gradients of a batch of `n` rows over processes, in one message.

        Parameters
        ----------
        terms
            NamedTuple of scalar tensors, averages over this process's share.
        n
            Rows of the whole batch.
        parameters
            Their `grad`, computed from the share, becomes that of the whole batch, in place.

        Returns
        -------
        NamedTuple
            Averages over the whole batch, detached.
        """
        if self.size == 1:
            return terms
        import torch
        from torch import distributed

        grads = [p.grad for p in parameters if p.grad is not None]
        scalars = torch.stack([value.detach().float() for value in terms])
        asked = self.asked()
        flat = torch.cat([*(grad.flatten() for grad in grads), scalars]) * self.weight(n)
        flat = torch.cat([flat, flat.new_tensor([0.0 if asked is None else 1.0])])
        distributed.all_reduce(flat)
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        if float(flat[-1]) > 0:
            self._agreed = asked or signal.SIGTERM
        return type(terms)(*flat[start:-1].unbind())

    def align(self, module: nn.Module) -> None:
        """Take over the first process's weights; they differ where devices round differently."""
        if self.size > 1:
            from torch import distributed

            for value in module.state_dict().values():
                distributed.broadcast(value, 0)

    def check_same(self, what: str, *values: str | int) -> None:
        """Check that all processes hold the same values.

        Raises
        ------
        MethodError
            Names what differs.
        """
        if self.size == 1:
            return
        import torch
        from torch import distributed

        own = torch.tensor([zlib.crc32(str(values).encode())], dtype=torch.int64, device=self.device)
        least, most = own.clone(), own.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if int(least) != int(most):
            raise MethodError(
                f"the {self.size} processes do not hold the same {what}; give all the same files and remove the "
                "checkpoint, or train in one process"
            )


ALONE = Group()
"""A process that trains alone."""
_group = ALONE


def current() -> Group:
    """The processes that this one trains with."""
    return _group


def refuse_alone(method: str, parallel: bool, processes: int) -> None:
    """Refuse several processes for a method that trains in one.

    Raises
    ------
    MethodError
        Names the method.
    """
    if processes > 1 and not parallel:
        raise MethodError(
            f"{method}: trains in one process, {processes} were asked for; leave `processes` out (or 1), or take a "
            "method whose loss is a sum over cells, such as perturbedvae with `mmd_weight: 0`"
        )


# --- being one of several -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(
    rank: int, size: int, device: str, store: Any = None, asked: Callable[[], int | None] = lambda: None
) -> Iterator[Group]:
    """Be process `rank` of `size` for the body: NCCL on GPUs, gloo else.

    Parameters
    ----------
    rank, size
        Place of this process, and how many there are.
    device
        `cpu`, or the GPU of this process.
    store
        Where the processes find each other; None takes what torchrun says.
    asked
        As in `Group`.
    """
    global _group
    import torch
    from torch import distributed

    backend = "nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    _group = Group(rank, size, device, asked)
    try:
        yield _group
        distributed.barrier()  # nobody leaves while another still waits for it
    finally:
        _group = ALONE
        if sys.exc_info()[0] is None:
            distributed.destroy_process_group()


def started_by_torchrun() -> bool:
    """Whether torchrun started this process; a scheduler's variables do not count."""
    return _TORCHRUN in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def torchrun_rank() -> int:
    """Rank of this process among those of torchrun; 0 without it."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def device_of(device: str, local_rank: int, processes: int) -> str:
    """The device of one process: its own GPU, or the CPU.

    Raises
    ------
    MethodError
        If there are fewer GPUs than processes on this machine.
    """
    import torch

    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "auto" and not n_gpus:
        return "cpu"
    if device == "cpu":
        return device
    if n_gpus < processes:
        raise MethodError(
            f"processes: {processes} on a machine with {n_gpus} GPU(s); give each one, or use device: cpu"
        )
    return f"cuda:{local_rank}"


# --- starting several ---------------------------------------------------------------------------------------------


def launch(target: Callable[..., Any], arguments: Mapping[str, Any], processes: int, device: str = "cpu") -> Any:
    """Call a function in several processes of this machine that train together; return what the first returns.

    The port by which they meet is one that the system has free. If one fails the others are ended, and its error is
    raised here. A signal to stop is passed on; training then ends after a step that all agree on.

    Parameters
    ----------
    target
        A function of a module, called as `target(**arguments)`.
    arguments
        What it takes; the entry `device`, if there is one, becomes each process's own.
    processes
        How many.
    device
        `cpu`, `cuda` or `auto`: one GPU for each process where there are any.

    Raises
    ------
    PerturbedError
        The first error of any process; another kind of error is shown where it happened, and named here in one line.
    Stopped
        If this process is asked to stop.
    """
    import multiprocessing

    from torch.distributed import TCPStore

    if started_by_torchrun():
        return _join_torchrun(target, arguments, device)
    devices = [device_of(device, rank, processes) for rank in range(processes)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    asked: Any = context.Value("i", 0)
    workers = []
    for rank in range(processes):
        own = {**arguments, "device": devices[rank]} if "device" in arguments else dict(arguments)
        place = (rank, processes, devices[rank], store.port, os.getpid())
        workers.append(context.Process(target=_work, args=(place, target, own, answers, asked), daemon=True))
    try:
        for worker in workers:
            worker.start()
        return _wait(workers, answers)
    except Stopped as stop:
        asked.value = stop.number
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(worker.is_alive() for worker in workers):
            time.sleep(_POLL_SECONDS)
        raise
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            if worker.pid is not None:
                worker.join()


def _join_torchrun(target: Callable[..., Any], arguments: Mapping[str, Any], device: str) -> Any:
    """Be one of torchrun's processes; it passes on signals and errors by itself."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    own = device_of(device, local, here)
    with joined(torchrun_rank(), int(os.environ["WORLD_SIZE"]), own):
        return target(**({**arguments, "device": own} if "device" in arguments else arguments))


def _wait(workers: list[Any], answers: Any) -> Any:
    """Wait for every process; the result of the first, or the first error of any."""
    done: dict[int, Any] = {}
    lost = ""
    while len(done) < len(workers):
        try:
            rank, kind, value = answers.get(timeout=1.0 if lost else _POLL_SECONDS)
        except queues.Empty:
            _check_alive(workers, done)
            if lost:
                raise MethodError(lost) from None
            continue
        if kind == "done":
            done[rank] = value
        elif kind == "stopped":
            raise Stopped(value)
        elif kind == "lost":  # perhaps only what it feels when another one ends; that one may still say why
            done[rank] = None
            lost = lost or f"process {rank} of {len(workers)} failed: {value}; its traceback stands above"
        else:
            raise getattr(errors, kind, PerturbedError)(value)
    if lost:
        raise MethodError(lost)
    return done[0]


def _check_alive(workers: list[Any], done: Mapping[int, Any]) -> None:
    """Raise where a process ended without a word; what it said was read before it was seen to end."""
    for rank, worker in enumerate(workers):
        code = worker.exitcode
        if rank not in done and code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise MethodError(
                f"process {rank} of {len(workers)} {how}; if memory ran out, give more of it or start fewer processes"
            )


def _work(
    place: tuple[int, int, str, int, int], target: Any, arguments: dict[str, Any], answers: Any, asked: Any
) -> None:
    """One process: join the others, call the target, and tell the parent how it went."""
    rank, size, device, port, parent = place
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent is asked, and passes it on
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr)
    try:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=False)
        with joined(rank, size, device, store, lambda: asked.value or None):
            answer = rank, "done", target(**arguments)
    except Stopped as stop:
        answer = rank, "stopped", stop.number
    except PerturbedError as error:
        answer = rank, type(error).__name__, str(error)
    except BaseException as error:  # whatever it is, the parent must hear of it
        lines = str(error).strip().splitlines() or [""]
        if "peer" not in lines[0]:  # one that went away speaks for itself
            traceback.print_exc()
        answer = rank, "lost", f"{type(error).__name__}: {lines[0][:200]}"
    answers.put(answer)
    answers.close()
    answers.join_thread()
    sys.stderr.flush()
    os._exit(0 if answer[1] == "done" else 1)  # threads of a broken group would wait for their peers


def _end_with(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
