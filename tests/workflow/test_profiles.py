"""What the profiles say, read by Snakemake's own parser; no Slurm is needed for that."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from pipeline import ROOT, Run

PROFILES = ("local", "gpu", "slurm")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a fresh clone holds of profiles and links."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    (folder / "slurm").symlink_to((ROOT / "slurm").readlink())
    (folder / "Snakefile").write_text("rule all:\n    input: []\n")
    return folder


def arguments(folder: Path, monkeypatch, *typed: str) -> Namespace:
    """What Snakemake makes of a command line typed in this folder."""
    from snakemake.cli import parse_args

    monkeypatch.chdir(folder)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    return parse_args(list(typed))[1]


def test_the_link_is_committed_and_relative():
    listed = subprocess.run(["git", "ls-files", "-s", "slurm"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        assert listed.stdout.startswith("120000 ")
    assert str((ROOT / "slurm").readlink()) == "profiles/slurm"


def test_profile_slurm_as_typed_in_a_fresh_clone(clone, monkeypatch):
    found = arguments(clone, monkeypatch, "--profile", "slurm")
    assert found.executor == "slurm"
    assert (found.jobs, found.retries, found.latency_wait) == (100, 2, 60)
    assert found.keep_going
    assert found.rerun_incomplete
    assert found.slurm_status_command == "squeue"
    assert found.slurm_requeue in (True, "true", "True")
    assert found.slurm_init_seconds_before_status_checks * 3 < 300  # MinJobAge, where nobody set it


def test_no_default_profile_is_laid_over_it(clone, monkeypatch):
    for name in ("profiles/default", "workflow/profiles/default"):
        assert not (ROOT / name).exists()
    found = arguments(clone, monkeypatch, "--profile", "slurm")
    assert found.workflow_profile is None
    said = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    assert dict(found.group_components) == said["group-components"]


def test_what_is_typed_wins_over_the_profile(clone, monkeypatch):
    found = arguments(clone, monkeypatch, "--profile", "slurm", "--jobs", "3", "--retries", "0")
    assert (found.jobs, found.retries) == (3, 0)


@pytest.mark.parametrize("name", PROFILES)
def test_every_entry_has_a_comment_and_is_an_option(name, clone, monkeypatch):
    text = (ROOT / f"profiles/{name}/config.yaml").read_text()
    for line in text.splitlines():
        if re.match(r"[a-z]", line) and not line.endswith(":"):
            assert "#" in line, f"profiles/{name}: no comment: {line}"
    found = vars(arguments(clone, monkeypatch, "--profile", f"profiles/{name}"))
    for key in yaml.safe_load(text):
        assert key.replace("-", "_") in found or key == "cores", key


def test_account_and_partition_alone_are_left_to_fill_in():
    text = (ROOT / "profiles/slurm/config.yaml").read_text()
    assert re.findall(r"^ *# (\w+): YOUR_", text, flags=re.MULTILINE) == ["slurm_account", "slurm_partition"]


# --- on the real workflow -------------------------------------------------------------------------------------------

PROBE = """
import json, sys
from snakemake.cli import main
from snakemake.executors.dryrun import Executor
from snakemake.resources import GroupResources

def described(job):
    keep = ("mem_mb", "runtime", "gpu", "gres", "slurm_extra", "slurm_account", "slurm_partition")
    resources = {key: job.resources.get(key) for key in keep}
    jobs = [inner.name for inner in job.jobs] if job.is_group() else [job.name]
    print("JOB " + json.dumps({"name": job.name, "jobs": jobs, "threads": job.threads, **resources}), flush=True)

layered = GroupResources.basic_layered.__func__
GroupResources.basic_layered = classmethod(lambda cls, *a, **k: layered(cls, *a, **{**k, "run_local": False}))
run = Executor.run_job
Executor.run_job = lambda self, job: (described(job), run(self, job))
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def submissions(tmp_path_factory) -> list[dict]:
    """What would be submitted for a run of forty fits, told apart by a dry run with the profile."""
    return list(dry_run(tmp_path_factory.mktemp("submissions")))


def dry_run(folder: Path, profile: Path = ROOT / "slurm", target: str = "benchmark", **changes):
    run = Run(folder)
    run.configure(**{"seeds": list(range(20)), **changes})
    command = [sys.executable, "-c", PROBE, "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml"]
    command += ["--profile", str(profile), "--dry-run", target]
    done = subprocess.run(
        command, cwd=folder, env=run.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JOB ")]
    assert found, done.stdout[-3000:]
    return found


@pytest.mark.workflow
def test_small_jobs_share_submissions(submissions):
    fits = [name for job in submissions for name in job["jobs"] if name == "fit"]
    assert len(fits) > 20
    assert [job["jobs"] for job in submissions if job["jobs"].count("fit") > 1] == [["fit"] * 3], "those of seconds"
    assert sum(job["jobs"].count("predict") for job in submissions) == len(fits)
    assert len([job for job in submissions if {"predict", "references"} & {*job["jobs"]}]) == -(-(len(fits) + 1) // 20)
    assert len([job for job in submissions if "split" in job["jobs"]]) == 1
    assert sorted(next(job for job in submissions if "split" in job["jobs"])["jobs"]) == [
        "check_leakage", "features", "split",
    ]  # fmt: skip


@pytest.mark.workflow
def test_a_group_asks_for_the_memory_of_one_job_and_the_time_of_all(submissions):
    group = max((job for job in submissions if "predict" in job["jobs"]), key=lambda job: len(job["jobs"]))
    assert len(group["jobs"]) >= 39
    assert group["mem_mb"] in (4000, 8000), "of one, and references ask for more"
    assert group["runtime"] <= 20 * (2 + 5)
    assert group["threads"] == 1


@pytest.mark.workflow
def test_no_submission_asks_for_more_than_a_partition_gives_at_any_attempt(submissions):
    """A day, which is what many partitions give: as much again is asked for at each of three attempts."""
    shared = [job for job in submissions if len(job["jobs"]) > 1]
    assert max(3 * job["runtime"] for job in shared) <= 12 * 60
    assert max(3 * job["runtime"] for job in submissions) <= 24 * 60


@pytest.mark.workflow
def test_leaves_of_the_whole_workflow_share_submissions(tmp_path):
    """Figures and tables of the studies: the default target, in which no group may wait for itself."""
    found = dry_run(tmp_path, target="all", seeds=[0])
    alone = {job["name"] for job in found if len(job["jobs"]) == 1 and job["name"].startswith(("draw_", "tabulate"))}
    assert alone == set()
    drawn = [job for job in found if any(name.startswith("draw_") for name in job["jobs"])]
    assert len(drawn) == 1
    assert len(drawn[0]["jobs"]) > 8
    assert drawn[0]["mem_mb"] == 2000


@pytest.mark.workflow
def test_fits_that_want_a_gpu_ask_for_one_and_are_warned_of_the_time_limit(submissions):
    fits = [job for job in submissions if job["name"] == "fit"]
    assert {job["gpu"] for job in fits} == {1}
    assert {job["gres"] for job in fits} == {""}
    assert {job["slurm_extra"] for job in fits} == {"--signal=TERM@120"}
    assert {job["gpu"] or 0 for job in submissions if job["name"] != "fit"} == {0}


@pytest.mark.workflow
def test_a_site_that_knows_only_gres_switches_it_on_in_one_line(clone, tmp_path):
    path = clone / "profiles/slurm/config.yaml"
    text = path.read_text()
    path.write_text(text.replace("# gpu_gres: gpu:1", "gpu_gres: gpu:1"))
    assert path.read_text() != text
    found = dry_run(tmp_path, clone / "slurm", seeds=[0])
    assert {job["gres"] for job in found if job["jobs"] == ["fit"]} == {"gpu:1"}
    assert {job["gres"] or "" for job in found if job["jobs"] != ["fit"]} == {""}
    assert {job["gpu"] or 0 for job in found} == {0}


@pytest.mark.workflow
def test_filled_in_and_on_the_cpu(clone, tmp_path):
    path = clone / "profiles/slurm/config.yaml"
    path.write_text(re.sub(r"# (slurm_\w+): YOUR_\w+", r"\1: some,thing", path.read_text()))
    found = dry_run(tmp_path, clone / "slurm", device="cpu")
    assert {job["gpu"] or 0 for job in found} == {0}
    assert {job["slurm_account"] for job in found} == {job["slurm_partition"] for job in found} == {"some,thing"}
