"""A Slurm of two nodes on the loopback interface, in one folder, taken down afterwards.

Jobs are tracked by cgroups, as on production clusters, where the machine allows it: the end of a
job is then the end of all its processes. Tracking by process ids lets orphans live on, which hides
dead signal handling; it is used only if cgroups do not work, and a warning says why.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forking.client import REPOSITORY
from tests.slurm.install import program, require_slurm

_START_S = 20.0
_HOSTS = Path("/etc/hosts")
_CGROUPS = Path("/sys/fs/cgroup")
_CONF = """
ClusterName=dwm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=20
MinJobAge=7200
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES State=UP GraceTime=120
PartitionName=urgent Nodes={nodes[0]},{nodes[1]} State=UP PriorityTier=9
"""


class Cluster:
    """The daemons of a running cluster, and commands for it."""

    def __init__(self, folder: Path, tracking: str) -> None:
        self._folder = folder
        self.tracking = tracking
        ports = _free_ports(3)
        self.nodes = [f"dwm-{ports[0]}-{number}" for number in (1, 2)]
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        for name in ("state", *self.nodes):
            (folder / name).mkdir(parents=True)
        text = _CONF.format(folder=folder, nodes=self.nodes, ports=ports, tracking=tracking)
        (folder / "slurm.conf").write_text(text)
        v2 = (_CGROUPS / "cgroup.controllers").exists()
        plugin = "cgroup/v2\nIgnoreSystemd=yes" if v2 else "cgroup/v1"
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\nCgroupMountpoint={_CGROUPS}\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and run a first job. Raises RuntimeError if that fails."""
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self._folder}/munge.{end}" for name, end in files.items()]
        self._begin("munged", "--foreground", "--force", *options)
        self._wait(lambda: (self._folder / "munge.socket").exists(), "munged gave no socket")
        self._begin("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: self.states() == {"idle"}, "the nodes did not become idle")
        probe = self.run("srun", "--nodes=2", "true", limit_s=_START_S)
        if probe.returncode:
            raise RuntimeError(f"srun failed: {probe.stderr.strip()}")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._begin(f"slurmd {node}", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node's daemon and its jobs' processes, as a power cut does."""
        daemon = self._daemons.pop(f"slurmd {node}")
        daemon.kill()
        daemon.wait()
        self._end_steps(node)

    def states(self) -> set[str]:
        """Returns the states of the nodes."""
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split())

    def run(self, *command: str, limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command with this cluster as its Slurm, from the repository."""
        return subprocess.run(
            command,
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields of a job, as `scontrol show job` prints them."""
        text = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, *states: str, limit_s: float = 90.0) -> dict[str, str]:
        """Wait for a job to reach one of the states; returns its fields."""
        deadline = time.monotonic() + limit_s
        while (fields := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, (states, fields)
            time.sleep(0.2)
        return fields

    def stop(self) -> None:
        """End the daemons and all jobs, and remove their cgroups."""
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for node in self.nodes:
            self._end_steps(node)
            for top in _CGROUPS.glob(f"*/slurm_{node}"):
                _remove_cgroup(top)

    def _end_steps(self, node: str) -> None:
        for pid in _step_daemons(self._folder / f"{node}.log"):
            _end_tree(pid)

    def _begin(self, name: str, *arguments: str) -> None:
        command = [str(program(name.split()[0])), *arguments]
        with (self._folder / f"{name.replace(' ', '-')}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _wait(self, is_so: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + _START_S
        while not is_so():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                lines = [self._last_line(name) for name in ended or self._daemons]
                raise RuntimeError(f"{otherwise}: {'; '.join(lines)}")
            time.sleep(0.1)

    def _last_line(self, name: str) -> str:
        text = (self._folder / f"{name.replace(' ', '-')}.out").read_text(errors="replace")
        return f"{name}: {(text.strip().splitlines() or ['no output'])[-1]}"


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster during the context; skips the test with the reason if there cannot be one."""
    require_slurm()
    reasons: list[str] = []
    for tracking in ("cgroup", "linuxproc"):
        cluster = Cluster(folder / tracking, tracking)
        with _named_hosts(cluster.nodes):
            try:
                cluster.start()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                cluster.stop()
                reasons.append(f"proctrack/{tracking}: {error}")
                continue
            if reasons:
                warnings.warn(f"jobs are tracked by {tracking}; {reasons[0]}", stacklevel=2)
            try:
                yield cluster
            finally:
                cluster.stop()
            return
    pytest.skip(f"Slurm does not start here: {' | '.join(reasons)}")


@contextlib.contextmanager
def _named_hosts(nodes: list[str]) -> Iterator[None]:
    """The nodes' names lead to this machine during the context."""
    line = f"127.0.0.1 {' '.join(nodes)}\n"
    with _HOSTS.open("a") as hosts:
        hosts.write(line)
    try:
        yield
    finally:
        # Not under another name and renamed: in a container /etc/hosts is a mount.
        _HOSTS.write_text(_HOSTS.read_text().replace(line, ""))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _step_daemons(log: Path) -> list[int]:
    """Returns the process ids of a node's slurmstepd; they hold the node's log open."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if "slurmstepd" in (entry / "cmdline").read_text() and any(
                file.readlink() == log for file in (entry / "fd").iterdir()
            ):
                found.append(pid)
    return found


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(status[1]) == pid:
                found.append(int(entry.name))
    return found


def _end_tree(pid: int) -> None:
    children = _children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        _end_tree(child)


def _remove_cgroup(top: Path) -> None:
    deadline = time.monotonic() + 5.0
    while top.is_dir() and time.monotonic() < deadline:
        for folder in sorted(top.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):  # until its last process is gone
                folder.rmdir()
