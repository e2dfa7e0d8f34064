"""Ranks as a real Slurm starts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_dwm.launch import first_host
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(60)

_PRINT = """
import os
from megatron_dwm.launch import find_launch
launch = find_launch(os.environ)
print(launch.launcher.value, launch.rank, launch.local_rank, launch.world_size, launch.host)
"""
_SCRIPT = f"""#!/bin/bash
show() {{ "$@" {sys.executable} -c '{_PRINT}'; }}
echo batch $(show)
for line in "$(show srun --ntasks=3 --nodes=2 --distribution=block)"; do sort <<<"$line"; done
echo one $(show srun --ntasks=1 --nodes=1)
echo torchrun $(show srun --ntasks=2 env RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 | sort -u)
"""


def test_a_step_has_ranks_and_a_batch_script_has_none(cluster: Cluster, tmp_path: Path) -> None:
    """sbatch sets SLURM_NTASKS=4 and SLURM_PROCID=0 for the script itself, too."""
    script, out = tmp_path / "job.sh", tmp_path / "out"
    script.write_text(_SCRIPT)
    options = ("--nodes=2", "--ntasks=4", f"--output={out}", "--error=/dev/null")
    number = cluster.run("sbatch", "--parsable", *options, str(script)).stdout.strip()
    fields = cluster.wait(number, "COMPLETED", "FAILED")
    assert fields["JobState"] == "COMPLETED", out.read_text()
    head = cluster.nodes[0]
    assert out.read_text().splitlines() == [
        "batch none 0 0 1 127.0.0.1",
        f"srun 0 0 3 {head}",
        f"srun 1 1 3 {head}",
        f"srun 2 0 3 {head}",
        "one none 0 0 1 127.0.0.1",
        "torchrun torchrun 5 1 8 127.0.0.1",
    ]


@pytest.mark.parametrize(
    "nodes", ["n1", "n[1-2]", "a[007-9],b", "r[0-3]n[01-16]", "x-[3,5-6],y[1-2]", "n[10,2]"]
)
def test_the_first_host_is_slurms(cluster: Cluster, nodes: str) -> None:
    names = cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
    assert first_host(nodes) == names[0]
