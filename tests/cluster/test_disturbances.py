"""Whatever happens to a job on a cluster, the run ends with the tables of an undisturbed one, to the byte."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from cluster_run import FIT, PATIENCE, ClusterRun
from loopback import Loopback, wait_for

pytestmark = pytest.mark.cluster

SAVED = "saved after"
RESUMED = "resuming after"


def test_undisturbed_through_the_profile(reference: ClusterRun):
    """The fit was given a GPU of its own, of which torch can make nothing: it says so and takes the CPU."""
    assert (reference.folder / "slurm").is_symlink()
    n_jobs = len(reference.submitted())
    assert n_jobs == 10, "simulate, prepare, fold, two fits, scores, summarise, figures, resolve_config, report"
    assert (reference.folder / "results/report.html").stat().st_size > 100_000
    record = json.loads((reference.folder / f"{FIT}/model.provenance.json").read_text())
    assert record["device"] == "cpu"
    assert record["device_reason"]
    baseline = FIT.replace("perturbedvae", "mean_effect")
    assert json.loads((reference.folder / f"{baseline}/model.provenance.json").read_text())["device"] == "cpu"


def test_a_cluster_without_such_a_gpu_refuses_once_and_the_fit_takes_the_cpu(run: ClusterRun, slurm: Loopback):
    """Asked for in the form and by the one line that the profile has for sites that know only `--gres`."""
    profile = run.folder / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("# gpu_gres: gpu:1", "gpu_gres: gpu:nosuch:1"))
    run.begin()
    run.finish()
    assert "sbatch failed" in run.said()
    assert "--gres=gpu:nosuch:1" in run.said()
    (job,) = run.submitted()
    assert "TresPerJob" not in slurm.describe(job)
    record = json.loads((run.folder / f"{FIT}/model.provenance.json").read_text())
    assert record["device"] == "cpu"


def test_a_fit_is_given_one_gpu_and_a_cancelled_one_resumes(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    run.begin()
    job = run.wait_for_training()
    known = slurm.describe(job)
    assert known["TresPerJob"] == "gres:gpu:1"
    variables = dict(line.split("=", 1) for line in environment_of(run.trainer()) if "=" in line)
    assert variables["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    slurm.cancel(job)
    again = run.wait_for_training(after=job)
    assert "TresPerJob" not in slurm.describe(again), "under `device: auto`"
    run.finish()
    run.must_have_resumed()
    assert SAVED in run.said()  # the log of the first try, which the profile has printed
    run.must_equal(reference)


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def test_over_the_time_limit(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """The fit is held until its minute is over; Slurm wakes it to say so, it saves, and the retry has more time."""
    run.begin("--set-resources", "fit:runtime=attempt")
    job = run.wait_for_training()
    os.kill(run.trainer(), signal.SIGSTOP)
    wait_for(lambda: job in slurm.jobs("TIMEOUT", "FAILED"), "the time limit has come", 240)
    again = run.wait_for_training(after=job)
    assert slurm.describe(again)["TimeLimit"] == "00:02:00"
    run.finish()
    run.must_have_resumed()
    assert SAVED in run.said()
    run.must_equal(reference)


def test_the_warning_before_the_time_limit(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """The profile's `--signal=TERM@120`, with seconds: it reaches the fit, and neither shell nor Snakemake die."""
    run.begin("--set-resources", "fit:runtime=2*attempt", "fit:slurm_extra='--signal=TERM@30'")
    job = run.wait_for_training()
    trainer = run.trainer()
    os.kill(trainer, signal.SIGSTOP)  # a fit of minutes
    wait_for(lambda: SAVED in run.fit_log() or wakes(trainer), "the warning has come", 150)
    run.wait_for_training(after=job)
    assert slurm.describe(job)["JobState"] == "FAILED", "ended by itself, before the limit"
    run.finish()
    run.must_have_resumed()
    assert SAVED in run.said()
    run.must_equal(reference)


def wakes(pid: int) -> None:
    """Let a held process go on where a SIGTERM waits for it; some versions of Slurm do that themselves."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    if any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks):
        os.kill(pid, signal.SIGCONT)


def test_over_memory(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """Killed without a warning, whatever Slurm calls it (OUT_OF_MEMORY with cgroups, FAILED without)."""
    leaks_once(run)
    run.begin("--set-resources", "fit:mem_mb=2000*attempt**2")
    run.finish()
    assert [slurm.describe(job)["MinMemoryNode"] for job in run.submitted()] == ["2000M", "8000M"]
    assert "Trying to restart job" in run.said()
    assert SAVED not in run.said()
    run.must_have_resumed()
    run.must_equal(reference)


def leaks_once(run: ClusterRun) -> None:
    """Make the first fit take 4 GB more once it has a checkpoint: a child of its job, which is counted with it."""
    leak = "x = b'x' * 4 * 10**9; import time; time.sleep(300)"
    script = f"""#!/bin/bash
if [ "$1" = fit ] && mkdir leaked 2>/dev/null; then
    (until [ -e {FIT}/model.checkpoint ]; do sleep 0.1; done; exec {sys.executable} -c "{leak}") &
fi
exec {Path(sys.executable).with_name("perturbed")} "$@"
"""
    program = run.folder / "bin/perturbed"
    program.parent.mkdir()
    program.write_text(script)
    program.chmod(0o755)


def test_preempted(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """Slurm takes the job off its node and starts it again later: no failure, no new submission."""
    run.begin()
    job = run.wait_for_training()
    slurm.scontrol("requeue", job)
    wait_for(lambda: slurm.describe(job)["JobState"] != "RUNNING", "the job is off its node")
    slurm.release(job)
    wait_for(lambda: slurm.describe(job)["Restarts"] == "1" and RESUMED in run.fit_log(), "it resumes", PATIENCE)
    run.finish()
    assert len(run.submitted()) == 1
    run.must_have_resumed()
    run.must_equal(reference)


def test_the_node_dies(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """Slurm requeues the job. Let go so soon, it may still be hit by what ends its first life: then it is retried."""
    run.begin()
    job = run.wait_for_training()
    slurm.kill_node()
    slurm.scontrol("update", f"nodename={slurm.host}", "state=down", "reason=test")
    wait_for(lambda: slurm.describe(job)["JobState"] in ("PENDING", "NODE_FAIL"), "Slurm has noticed")
    slurm.start_node()
    slurm.wait_for_node()
    slurm.release(job)
    run.finish()
    run.must_have_resumed()
    run.must_equal(reference)


def test_the_controller_restarts(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """While it is down Snakemake cannot ask; the job goes on."""
    run.begin()
    run.wait_for_training()
    slurm.kill_controller()
    time.sleep(5)
    slurm.start_controller()
    slurm.wait_for_node()
    run.finish()
    assert len(run.submitted()) == 1
    run.must_equal(reference)


def test_snakemake_is_killed_and_its_job_lives_on(run: ClusterRun, reference: ClusterRun, slurm: Loopback):
    """The second run starts the same fit beside the first's orphan; they do not get into each other's way."""
    run.begin()
    orphan = run.wait_for_training()
    trainer = run.trainer()
    os.kill(trainer, signal.SIGSTOP)  # so that it is still there when its successor begins
    run.kill()
    run.begin()
    assert run.process is not None
    assert run.process.wait(timeout=PATIENCE) != 0
    assert "--unlock" in run.said()
    run.begin("--unlock")
    run.finish()
    run.begin()
    wait_for(lambda: "another process is at this fit" in run.fit_log(), "the successor waits", PATIENCE)
    os.kill(trainer, signal.SIGCONT)
    run.finish()
    assert slurm.describe(orphan)["JobState"] == "COMPLETED"
    run.must_equal(reference)
