"""Runs the repository's tools, and gives the environment of every command of the study."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_dwm.config import UserError

REPOSITORY = Path(__file__).parent.parent.parent
# Otherwise glibc returns every large tensor's memory to the system and requests it again.
_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def environment(gpu: int | None = None) -> dict[str, str]:
    """Returns the environment of a command, which has one thread.

    gpu: number of the only one that it sees, among those that are visible now.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    own = {}
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = visible[gpu] if gpu < len(visible) else str(gpu)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **_MEMORY, **own, **fixed}


def run_tool(name: str, *words: str, **options: object) -> None:
    """Run a file of tools/, or of another folder beside it.

    options: `an_option=value` becomes `--an-option value`. Raises UserError with the command and
    its last line if it fails.
    """
    given = [word for key, value in options.items() for word in (_option(key), str(value))]
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *words, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{shlex.join(command)}: {last}")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
