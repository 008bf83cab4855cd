"""A run on the loopback Slurm through `--profile slurm`, and handles to disturb it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from loopback import Loopback, wait_for

ROOT = Path(__file__).parents[2]
FIT = "results/tiny/zero_shot/fold0/perturbedvae/seed0"
LATER = (f"{FIT}/model", f"{FIT}/training.csv", f"{FIT}/prediction.h5ad", f"{FIT}/scores.parquet", f"{FIT}/details",
         "results/tables", f"{FIT}/logs/fit.log")  # fmt: skip
# What a cluster needs minutes for, in seconds; everything else is the profile's.
QUICK = {"slurm-init-seconds-before-status-checks": 2, "seconds-between-status-checks": 2, "latency-wait": 15,
         "max-status-checks-per-second": 10}  # fmt: skip
PATIENCE = 600
"""Seconds for what takes some ten on an idle machine."""


@dataclass
class ClusterRun:
    """A clone in which Snakemake runs `tests/configs/cluster.yaml` on Slurm."""

    folder: Path
    slurm: Loopback
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def clone(self) -> None:
        """Clone the repository, with what is not committed yet; where there is none, copy it."""
        if not (ROOT / ".git").exists():
            shutil.copytree(ROOT, self.folder, symlinks=True, ignore=shutil.ignore_patterns(".*", "results"))
            return
        git = ["git", "-c", "safe.directory=*"]
        subprocess.run([*git, "clone", "--quiet", "--depth=1", f"file://{ROOT}", str(self.folder)], check=True)
        changed = [*git, "ls-files", "-z", "--modified", "--others", "--exclude-standard"]
        shown = subprocess.run(changed, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        for name in filter(None, shown.stdout.decode().split("\0")):
            (self.folder / name).unlink(missing_ok=True)
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)

    def configure(self) -> None:
        """Put the suite's config in place of the default, and seconds for what a cluster needs minutes for."""
        shutil.copy(self.folder / "tests/configs/cluster.yaml", self.folder / "config/config.yaml")
        profile = self.folder / "profiles/slurm/config.yaml"
        text = profile.read_text()
        for key, seconds in QUICK.items():
            text, n = re.subn(rf"^{key}: .*$", f"{key}: {seconds}", text, flags=re.MULTILINE)
            assert n == 1, key
        profile.write_text(text)

    def copy_before_fit(self, folder: Path) -> ClusterRun:
        shutil.copytree(self.folder, folder, symlinks=True)
        for name in LATER:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "run.log").unlink()
        return ClusterRun(folder, self.slurm)

    # --- Snakemake --------------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("snakemake")), *arguments]

    def environment(self) -> dict[str, str]:
        ours = (self.folder / "bin", self.slurm.home / "bin", Path(sys.executable).parent)  # a test may fill the first
        path = os.pathsep.join([*map(str, ours), os.environ["PATH"]])
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PERTURBED_CHECKPOINT_SECONDS": "1"}

    def begin(self, *arguments: str, target: str = f"{FIT}/model") -> None:
        """Start Snakemake with the profile and come back."""
        with open(self.folder / "run.log", "ab") as log:
            self.process = subprocess.Popen(
                self.command("--profile", "slurm", *arguments, *(["--", target] if target else [])),
                cwd=self.folder, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self) -> None:
        """Wait until Snakemake is done."""
        assert self.process is not None
        code = self.process.wait(timeout=2 * PATIENCE)
        self.process = None
        assert code == 0, self.said()[-6000:]

    def kill(self) -> None:
        """End Snakemake as a power cut on the login node would; Slurm's jobs live on."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def end(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for job in self.slurm.jobs():
            self.slurm.cancel(job)
        wait_for(lambda: not self.slurm.jobs(), "no job is left")

    def said(self) -> str:
        """What Snakemake printed."""
        return (self.folder / "run.log").read_text(errors="replace")

    def submitted(self) -> list[str]:
        """Ids of the Slurm jobs that were submitted, in order."""
        return re.findall(r"has been submitted with SLURM jobid (\d+)", self.said())

    # --- the fit ----------------------------------------------------------------------------------------------------

    def fit_log(self) -> str:
        path = self.folder / FIT / "logs/fit.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_for_training(self, *, after: str = "") -> str:
        """Wait until the fit trains and has a checkpoint, from where Slurm job `after` left it; the job's id."""
        said = "resuming after" if after else "checkpoints go to"
        checkpoint = self.folder / f"{FIT}/model.checkpoint"

        def found() -> str | None:
            running = [job for job, rule in self.slurm.jobs("RUNNING").items() if rule.startswith("rule_fit")]
            begun = said in self.fit_log() and checkpoint.is_file()
            return running[0] if running and running[0] != after and begun else None

        def ready() -> bool:
            ended = self.process is not None and self.process.poll() is not None
            assert not ended, self.said()[-4000:]
            return found() is not None

        wait_for(ready, "the fit trains", PATIENCE)
        return str(found())

    def must_have_resumed(self) -> None:
        """Fail unless the fit went on where a checkpoint had left it."""
        steps = [int(step) for step in re.findall(r"resuming after step (\d+)", self.fit_log() + self.said())]
        assert steps, "no attempt resumed"
        assert min(steps) > 0

    def trainer(self) -> int:
        """Process id of the fit."""
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                here = Path(f"/proc/{pid}/cwd").resolve() == self.folder.resolve()
            except OSError:
                continue
            if here and b"fit" in words[2:3] and words[1].endswith(b"/perturbed"):
                return pid
        raise AssertionError("no fit runs in this folder")

    def results(self) -> dict[str, bytes]:
        """Bytes of the tables, and of the fitted model."""
        files = [path for path in (self.folder / "results/tables").iterdir() if "provenance" not in path.name]
        files += (self.folder / FIT / "model").iterdir()
        files += [self.folder / FIT / "scores.parquet", self.folder / FIT / "training.csv"]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def must_equal(self, reference: ClusterRun) -> None:
        """Fail where a byte of a result differs, or something is left that a clean run does not leave.

        What follows the fit is run here and not on Slurm, for time.
        """
        left = [path for path in (self.folder / FIT).iterdir() if "checkpoint" in path.name or ".part." in path.name]
        assert left == []
        done = subprocess.run(
            self.command("--cores", "2", "benchmark"), cwd=self.folder, env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        assert "Fit perturbedvae" not in done.stdout
        here, there = self.results(), reference.results()
        assert here.keys() == there.keys()
        assert [name for name in there if here[name] != there[name]] == []
