"""Ranks as torchrun and Slurm give them; the variables are those of a real Slurm 22.05."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.launch import Launch, Launcher, find_launch, first_host

REPOSITORY = Path(__file__).parent.parent
JOB = {"SLURM_JOB_ID": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
# A batch script's own process, and a shell of salloc without ranks.
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    **JOB,
    **{"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
}
TORCHRUN = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"},
    **{"MASTER_ADDR": "head", "MASTER_PORT": "29500"},
}
ALONE = Launch(launcher=Launcher.NONE, rank=0, local_rank=0, world_size=1, host="127.0.0.1", port=0)


def test_srun_starts_the_ranks() -> None:
    assert find_launch(STEP) == Launch(
        launcher=Launcher.SRUN, rank=3, local_rank=1, world_size=4, host="n1", port=20015
    )


def test_mpirun_is_refused() -> None:
    """Its processes have no variables that we know, so each would train alone."""
    with pytest.raises(UserError, match="mpirun: .*start the ranks with torchrun or srun"):
        find_launch({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"})
    assert find_launch({"OMPI_COMM_WORLD_SIZE": "4", **TORCHRUN}).world_size == 8
    assert find_launch({"OMPI_COMM_WORLD_SIZE": "1"}) == ALONE


def test_torchruns_variables_decide() -> None:
    """Also in a process of torchrun that srun has started, one on each node."""
    expected = Launch(
        launcher=Launcher.TORCHRUN, rank=5, local_rank=1, world_size=8, host="head", port=29500
    )
    assert find_launch(TORCHRUN) == expected
    assert find_launch({**STEP, **TORCHRUN}) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,
        BATCH,
        # srun --pty bash: a step of one process
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # salloc's own interactive step
        {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["no launcher", "salloc", "batch script", "srun --pty", "interactive step"],
)
def test_a_process_without_ranks_beside_it_is_a_job_of_one(environment: dict[str, str]) -> None:
    assert find_launch(environment) == ALONE


def test_address_and_port_can_be_set() -> None:
    found = find_launch({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "31000"})
    assert (found.host, found.port) == ("10.0.0.1", 31000)


def test_ports_are_sound_and_differ_between_steps() -> None:
    jobs = [{**STEP, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)} for j, s in _recent_steps()]
    ports = [find_launch(job).port for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 32000 for port in ports)


def _recent_steps() -> list[tuple[int, int]]:
    """Returns the first steps of a thousand consecutive jobs."""
    return [(67_108_000 + job, step) for job in range(1000) for step in range(7)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[008-015,020]", "gpu008"),
        ("n[7,9-11],m[1-2]", "n7"),
        ("rack[0-3]node[01-16]", "rack0node01"),
        ("a-b-[3-4]-ib,c", "a-b-3-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_PROCID": "three"}, "SLURM_PROCID: expected a whole number, got 'three'"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT: expected a whole number, got '-1'"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST: not set"),
    ],
)
def test_a_wrong_variable_is_named(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_launch({**STEP, **changed})


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {**STEP, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "megatron_dwm.doctor", "--parallel.tensor", "2"],
            env={**os.environ, **environment, "MASTER_PORT": port},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: rank 0 on {socket.gethostname()}: port {port} is in use; start again, with "
        "another MASTER_PORT if it repeats"
    ]
