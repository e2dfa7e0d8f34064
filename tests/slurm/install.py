"""Slurm and munge from Debian's packages, installed if the tests may and they are missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_LIMIT_S = 120


def require_slurm() -> None:
    """Install Slurm if it is missing; skips the test with the reason if that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of our own needs root (daemons, cgroups, /etc/hosts)")
    if not _missing():
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"Slurm is not installed ({', '.join(_missing())}), and apt-get is missing")
    # Another worker of pytest may be at it; apt-get refuses a second process.
    with (Path(tempfile.gettempdir()) / "megatron_dwm_tests_apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _missing():
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *_PACKAGES)
    if _missing():
        pytest.skip(f"Debian's packages do not have {', '.join(_missing())}")


def program(name: str) -> str | None:
    """Returns the path of a program, which may be a system's daemon; None if it is missing."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _missing() -> list[str]:
    return [name for name in _PROGRAMS if program(name) is None]


def _apt(*arguments: str) -> None:
    # At runlevel 1 the packages' own services are not started.
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    try:
        done = subprocess.run(
            ["apt-get", *arguments],
            env={**os.environ, **quiet},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"apt-get {arguments[0]} took more than {_LIMIT_S} s")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        pytest.skip(f"apt-get {arguments[0]} failed: {' '.join(last)}")
