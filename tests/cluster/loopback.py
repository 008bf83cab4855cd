"""A real Slurm on the loopback interface: munge, slurmctld and one slurmd, without systemd and without cgroups.

Needs root on Debian or Ubuntu. Everything but munge lies in one folder, to which `SLURM_CONF` points while it runs, and
takes ports of its own: a Slurm of this machine, and `/etc/slurm`, are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIGS = ("slurm.conf", "gres.conf", "cgroup.conf")
LOCK = Path("/run/lock/perturbed-cluster-tests")
"""Held by the one suite that a machine has time for."""

SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.log
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=3600
OverTimeLimit=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={mem_mb} Gres=gpu:fake:{gpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE DefMemPerCPU=500 State=UP OverSubscribe=NO
"""
GRES_CONF = "NodeName={host} Name=gpu Type=fake Flags=nvidia_gpu_env File={home}/dev/nvidia[0-{last}]\n"
CGROUP_CONF = "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"


def why_not() -> str:
    """Why no Slurm can be brought up here; empty where one can."""
    if os.geteuid() != 0:
        return "needs root, to install and start Slurm"
    if shutil.which("apt-get") is None:
        return "needs Debian or Ubuntu (apt-get), to install Slurm"
    return ""


def install() -> None:
    """Install what is missing of Slurm's Debian packages, without starting anything."""
    check = ["dpkg-query", "--show", "--showformat=${Status}"]
    missing = [p for p in PACKAGES if "install ok" not in _run(*check, p, check=False)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run("apt-get", "update", "-qq", env=environment)
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=environment)


def _run(*command: str, check: bool = True, **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return str(done.stdout)


def wait_for(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until `true()`.

    Raises
    ------
    TimeoutError
        If it does not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.2)


@dataclass
class Loopback:
    """One Slurm with one node, which pretends to have these CPUs, this memory and these GPUs."""

    home: Path
    cpus: int = 4
    mem_mb: int = 20000
    gpus: int = 2
    host: str = field(default_factory=lambda: socket.gethostname().split(".")[0])
    lock: int | None = None

    def start(self) -> None:
        """Install, configure and start everything, and wait until the node is idle."""
        install()
        self._configure()
        self._start_munge()
        self.start_controller()
        self.start_node()
        self.wait_for_node()

    def claim(self) -> str:
        """Keep other suites away until `stop`; why that cannot be, or empty."""
        self.lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another cluster suite runs on this machine ({LOCK}); wait until it ends"
        return ""

    def stop(self) -> None:
        """End all jobs and daemons that this object started."""
        try:
            if self._alive("slurmctld"):
                _run("scancel", "--user=root", check=False)
                with contextlib.suppress(TimeoutError):
                    wait_for(lambda: not self.jobs(), "no job is left", 30)
            for daemon in ("slurmd", "slurmctld", "munged"):
                self._end(daemon)
        finally:
            os.environ.pop("SLURM_CONF", None)
            if self.lock is not None:
                os.close(self.lock)

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        _run("slurmctld")
        wait_for(lambda: "is UP" in _run("scontrol", "ping", check=False), "slurmctld answers")

    def kill_controller(self) -> None:
        """End slurmctld as a crash would."""
        self._end("slurmctld", signal.SIGKILL)

    def start_node(self) -> None:
        """Start slurmd."""
        _run("slurmd")

    def kill_node(self) -> None:
        """End slurmd and all that it started, as a power cut would."""
        steps = [int(pid) for pid in _run("pgrep", "-f", "^slurmstepd: ", check=False).split() if self._is_own(pid)]
        running = [pid for step in steps for pid in _family(step)]  # parents first, so that none reports a death
        self._end("slurmd", signal.SIGKILL)
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_node(self) -> None:
        """Wait until the node takes jobs, after bringing it back where Slurm thinks it is down."""
        states = ("idle", "mixed", "allocated")

        def ready() -> bool:
            state = self.node_state()
            if state.startswith(("down", "drain")):
                self.scontrol("update", f"nodename={self.host}", "state=resume", check=False)
            return state in states

        wait_for(ready, "the node is ready")

    def node_state(self) -> str:
        """State of the node, in Slurm's word."""
        return _run("sinfo", "--noheader", "--format=%T", check=False).split("\n")[0].strip()

    def scontrol(self, *arguments: str, check: bool = True) -> str:
        """Call scontrol."""
        return _run("scontrol", *arguments, check=check)

    def jobs(self, *states: str) -> dict[str, str]:
        """Comment (which names the rule) of each job in these states by id; else of all that are not over."""
        chosen = [f"--states={','.join(states)}"] if states else []
        shown = _run("squeue", "--noheader", "--format=%i|%k", *chosen, check=False)
        return dict(line.split("|", 1) for line in shown.splitlines() if "|" in line)

    def describe(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.scontrol("show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def cancel(self, job: str, *options: str) -> None:
        """Call scancel."""
        _run("scancel", *options, job)

    def release(self, job: str) -> None:
        """Let a requeued job start now; Slurm holds it back for some minutes."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            wait_for(lambda: self.describe(job)["JobState"] == "PENDING", f"{job} is pending", 60)
            self.scontrol("update", f"jobid={job}", "StartTime=now")

    # --- parts ------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        for folder in ("state", "spool", "log", "run", "dev", "bin"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        for gpu in range(self.gpus):  # Slurm wants character devices; these are the null device
            node = self.home / f"dev/nvidia{gpu}"
            if not node.exists():
                os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        known = {"host": self.host, "home": self.home, "cpus": self.cpus, "mem_mb": self.mem_mb, "gpus": self.gpus}
        known |= dict(zip(("port", "node_port"), _free_ports(2)))
        texts = (SLURM_CONF.format(**known), GRES_CONF.format(**known, last=self.gpus - 1), CGROUP_CONF)
        for name, text in zip(CONFIGS, texts):
            (self.home / name).write_text(text)
        # For every program started from here and its jobs, but Snakemake hides Slurm's variables from its srun.
        os.environ["SLURM_CONF"] = str(self.home / CONFIGS[0])
        (self.home / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={self.home}/slurm.conf exec /usr/bin/srun "$@"\n')
        (self.home / "bin/srun").chmod(0o755)

    def _start_munge(self) -> None:
        if _run("munge", "-n", check=False).startswith("MUNGE:"):
            return
        modes = {"/run/munge": 0o755, "/var/log/munge": 0o700, "/var/lib/munge": 0o700, "/etc/munge": 0o700}
        for folder, mode in modes.items():
            Path(folder).mkdir(exist_ok=True)
            shutil.chown(folder, "munge", "munge")
            Path(folder).chmod(mode)
        key = Path("/etc/munge/munge.key")
        if not key.is_file():
            key.write_bytes(os.urandom(1024))
            shutil.chown(key, "munge", "munge")
            key.chmod(0o400)
        _run("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--pid-file=/run/munge/munged.pid")
        (self.home / "run/munged.pid").symlink_to("/run/munge/munged.pid")
        wait_for(lambda: _run("munge", "-n", check=False).startswith("MUNGE:"), "munge answers")

    def _pid(self, daemon: str) -> int | None:
        try:
            return int((self.home / f"run/{daemon}.pid").read_text())
        except (OSError, ValueError):
            return None

    def _alive(self, daemon: str) -> bool:
        pid = self._pid(daemon)
        return pid is not None and Path(f"/proc/{pid}").exists()

    def _end(self, daemon: str, how: signal.Signals = signal.SIGTERM) -> None:
        pid = self._pid(daemon)
        if pid is None or not self._alive(daemon):
            return
        os.kill(pid, how)
        try:
            wait_for(lambda: not self._alive(daemon), f"{daemon} has ended", 15)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)

    def _is_own(self, step: str) -> bool:
        """Whether a slurmstepd was started by this slurmd and not by one that belongs to the machine."""
        try:
            return str(self.home).encode() in Path(f"/proc/{step}/environ").read_bytes()
        except OSError:
            return False


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _family(pid: int) -> list[int]:
    """A process and all that it started, itself first."""
    children = [int(child) for child in _run("pgrep", "-P", str(pid), check=False).split()]
    return [pid, *(found for child in children for found in _family(child))]
