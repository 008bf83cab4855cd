"""Where a model trains, and why there; one process on one device, whatever the scheduler says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from perturbed.errors import MethodError

log = logging.getLogger(__name__)

LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "LSB_", "JSM_", "TORCHELASTIC_")
"""What the variables of schedulers and launchers begin with that Lightning takes for a launch of many processes."""
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables of torch's own launcher."""
GIVEN = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS", "SLURM_GPUS_ON_NODE")
"""Slurm sets one of these in a job that was given GPUs."""


class Device(NamedTuple):
    """Where a model trains."""

    name: str
    """As torch names it: `cpu`, `cuda`, `cuda:1`."""
    reason: str
    """Why there; goes into the provenance record."""


def choose_device(wanted: str) -> Device:
    """The device to train on: `auto` takes a GPU that works and else the CPU, which the record then explains.

    Raises
    ------
    MethodError
        If a GPU is asked for by name and none can be used.
    """
    if not (wanted == "auto" or wanted.startswith("cuda")):
        return Device(wanted, "asked for")
    name = "cuda" if wanted == "auto" else wanted
    lacking = why_no_gpu(name)
    if not lacking:
        import torch

        return Device(name, f"{'found' if wanted == 'auto' else 'asked for'}: {torch.cuda.get_device_name(name)}")
    given = next((key for key in GIVEN if os.environ.get(key)), None)
    if wanted != "auto":
        if given is None and "SLURM_JOB_ID" in os.environ:
            lacking = f"Slurm gave this job none ({lacking})"
        raise MethodError(f"device: {wanted} was asked for but {lacking}; use `device: auto` or cpu")
    if given is not None:
        log.warning("device: training on the CPU, though the scheduler gave a GPU (%s): %s", given, lacking)
    return Device("cpu", lacking)


def why_no_gpu(name: str = "cuda") -> str:
    """Why torch cannot use this GPU; empty where it can. It is tried, because busy and broken ones are listed too."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without GPU support"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "torch finds no GPU" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        return f"the GPU cannot be used ({' '.join(str(error).split())[:120]})"
    return ""


@contextmanager
def one_process() -> Iterator[None]:
    """Hide from the body that a scheduler started this process; around trainers that would join others.

    Lightning takes Slurm's variables for a launch of `SLURM_NTASKS` processes: it waits for the others, or refuses.
    """
    hidden = {key: value for key, value in os.environ.items() if key.startswith(LAUNCHERS) or key in RANKS}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)
