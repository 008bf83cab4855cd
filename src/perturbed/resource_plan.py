"""What the jobs of a run ask of a machine, by attempt, and which of them are small enough to share a submission.

Part of the plan (`perturbed.plan`): sizes of files are looked at, nothing is read. An attempt is one submission of a
scheduler; the profile says how many there are (`retries`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbed.plan import Plan

SHORT = 15
"""Minutes; fits of methods without a network that ask for no more share a submission."""
STREAMED = 16_000
"""MB beside the tables of cells for preparing what is streamed (`perturbed.data.prepare_streamed`)."""
GRES = "gpu_gres"
"""Key of a profile's `default-resources`: what a site that knows only `--gres` wants to be asked for, as `gpu:1`."""


def grow(amount: int) -> Callable[[Any, int], int]:
    """Grow a resource: this much, and as much again at every further attempt."""
    return lambda wildcards, attempt: attempt * amount


def read_gres(defaults: Mapping[str, Any] | None) -> str:
    """What a GPU is called where the profile asks for it by `--gres`; empty where it is `--gpus`."""
    raw = getattr((defaults or {}).get(GRES), "raw", None)  # Snakemake gives an empty resource for what is not there
    return str(raw or "").strip("'\"")


class ResourcePlan:
    """Memory, minutes, GPUs and groups of a plan.

    Parameters
    ----------
    plan
        The run they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.site_gres = ""
        """The `gpu_gres` of the site's profile (`read_gres`)."""

    def of_method(self, name: str) -> Callable[[Any, int], int]:
        """A function of wildcards that gives `mem_mb` or `runtime` of the method, more of it at every attempt."""
        return lambda wildcards, attempt: attempt * int(getattr(self.plan.methods[wildcards.method], name))

    def cells_gb(self, wildcards: Any) -> float:
        """Memory budget of a fit's cells in GB: the same at every attempt, so that a retry ends as the first would."""
        own = self.plan.methods[wildcards.method].mem_mb / 2000
        return own if self.plan.config.memory_gb is None else self.plan.config.memory_gb

    def prepare(self, wildcards: Any, input: Any, attempt: int) -> int:
        """Memory for `prepare` in MB: eight times what it reads, up to where it streams and holds tables of cells."""
        return attempt * max(4000, min(8 * int(input.size_mb), STREAMED + 2 * int(input.size_mb) // 5))

    def by_size(self, minutes: int, per_gb: float) -> Callable[[Any, int], int]:
        """A function of wildcards that gives minutes, growing with the prepared cells, and as much at every attempt."""

        def runtime(wildcards: Any, attempt: int) -> int:
            prepared = Path(self.plan.data("prepared.h5ad").format(dataset=wildcards.dataset))
            size = prepared.stat().st_size if prepared.is_file() else 0
            return attempt * (minutes + math.ceil(per_gb * size / 1e9))

        return runtime

    # --- GPUs -----------------------------------------------------------------------------------------------------

    def wants_gpu(self, attempt: int) -> bool:
        """Whether a job that can use a GPU asks for one: `cuda` always, `auto` at the first attempt, `cpu` never.

        A cluster without GPUs refuses the submission; what is tried again under `auto` then runs on the CPU.
        """
        device = self.plan.config.device
        return device == "cuda" or (device == "auto" and attempt == 1)

    def _asked(self, attempt: int, wanted: bool) -> bool:
        return wanted and self.wants_gpu(attempt)

    def fit_gpu(self, wildcards: Any, attempt: int) -> int:
        """GPUs of a fit, by number: one for a method that wants one."""
        return int(self._asked(attempt, self._trains(wildcards)) and not self.site_gres)

    def fit_gres(self, wildcards: Any, attempt: int) -> str:
        """The same by `--gres`, at a site that knows only that."""
        return self.site_gres if self._asked(attempt, self._trains(wildcards)) else ""

    def gpu(self, wildcards: Any, attempt: int) -> int:
        """GPUs of another job that trains a network, by number."""
        return int(self.wants_gpu(attempt) and not self.site_gres)

    def gres(self, wildcards: Any, attempt: int) -> str:
        """The same by `--gres`."""
        return self.site_gres if self.wants_gpu(attempt) else ""

    def _trains(self, wildcards: Any) -> bool:
        return self.plan.methods[wildcards.method].resources == "gpu"

    # --- small networks -------------------------------------------------------------------------------------------

    @property
    def small_device(self) -> str:
        """Device of small networks, which gain nothing from a GPU: the CPU, unless a GPU is asked for by name."""
        return "cuda" if self.plan.config.device == "cuda" else "cpu"

    def small_gpu(self, wildcards: Any) -> int:
        """GPUs of a job with small networks, by number."""
        return int(self.small_device == "cuda" and not self.site_gres)

    def small_gres(self, wildcards: Any) -> str:
        """The same by `--gres`."""
        return self.site_gres if self.small_device == "cuda" else ""

    # --- groups ---------------------------------------------------------------------------------------------------

    def fit_group(self, wildcards: Any) -> str | None:
        """`fit` for fits of seconds, which then share a submission; the others have one each."""
        spec = self.plan.methods[wildcards.method]
        short = spec.resources == "cpu" and not spec.environment and spec.runtime <= SHORT
        return "fit" if short else None
