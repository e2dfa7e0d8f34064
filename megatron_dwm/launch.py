"""How this process was started: its rank, the size of its job, and the address where ranks meet.

torchrun's variables decide if RANK is there. Otherwise Slurm's do, if `srun` started this process:
its signals then reach every rank, and the job step's exit code is the ranks' own. Otherwise the
process is a job of one.

A batch script and an interactive shell have SLURM_NTASKS and SLURM_PROCID too, but no ranks beside
them. Only in a job step is SLURM_STEP_NUM_TASKS set, to the number of processes that srun started.

Nothing heavy is imported here: commands ask for their rank before they import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_dwm.config.errors import UserError

# Below the ports that Linux gives to outgoing connections, and above those of system services.
_FIRST_PORT, _PORTS = 20000, 12000
_STEPS = 7  # port numbers between consecutive jobs: steps of a job that run side by side differ


class Launcher(Enum):
    """The program that started the processes of this job."""

    TORCHRUN = "torchrun"
    SRUN = "srun"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those of its job.

    host, port: where rank 0 holds the job's store; port 0 stands for any free one.
    """

    launcher: Launcher
    rank: int
    local_rank: int
    world_size: int
    host: str
    port: int


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Returns how this process was started. Raises UserError if a variable is missing or wrong."""
    if "RANK" in environment:
        return Launch(
            launcher=Launcher.TORCHRUN,
            rank=_number(environment, "RANK"),
            local_rank=_number(environment, "LOCAL_RANK", environment["RANK"]),
            world_size=_number(environment, "WORLD_SIZE", "1"),
            host=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environment, "MASTER_PORT", "0"),
        )
    if all(name in environment for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        size = _number(environment, "SLURM_STEP_NUM_TASKS")
        if size > 1:
            return _started_by_srun(environment, size)
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        raise UserError(
            "mpirun: its processes would each be a run of their own; start the ranks with torchrun "
            "or srun"
        )
    return Launch(
        launcher=Launcher.NONE, rank=0, local_rank=0, world_size=1, host="127.0.0.1", port=0
    )


def _started_by_srun(environment: Mapping[str, str], size: int) -> Launch:
    """MASTER_ADDR and MASTER_PORT have precedence over Slurm's first host and job id."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UserError(
            "SLURM_STEP_NODELIST: not set, though srun started this process; set MASTER_ADDR to "
            "the host of rank 0"
        )
    return Launch(
        launcher=Launcher.SRUN,
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID", "0"),
        world_size=size,
        host=host,
        port=_number(environment, "MASTER_PORT", str(_port(environment))),
    )


def _port(environment: Mapping[str, str]) -> int:
    """Returns a port: the same on all ranks of a job step, and seldom that of another step."""
    job, step = (_number(environment, f"SLURM_{name}_ID", "0") for name in ("JOB", "STEP"))
    return _FIRST_PORT + (job * _STEPS + step) % _PORTS


def first_host(nodes: str) -> str:
    """Returns the first host of Slurm's list of nodes: `rack[0-3,7]n[08-15],login` has rack0n08."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert match is not None  # it may be empty
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0])


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.isascii() or not text.isdigit():
        found = "it is not set" if text is None else f"got {text!r}"
        raise UserError(f"{name}: expected a whole number, {found}; unset it or correct it")
    return int(text)
