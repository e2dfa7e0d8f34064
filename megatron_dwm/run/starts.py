"""Notes every start of a run: when, where, by which command, with which versions."""

from __future__ import annotations

import json
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import megatron_dwm
from megatron_dwm.runtime import Runtime, releases

STARTS_FILE = "starts.jsonl"
_PACKAGES = ("torch", "numpy", "transformer-engine")
_SOURCE = Path(megatron_dwm.__file__).parent.parent


def note_start_of_job(run_dir: Path, step: int, runtime: Runtime) -> None:
    """Append a line to `starts.jsonl`. step: from which the run goes on. Raises OSError."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "processes": runtime.world_size,
        "device": str(runtime.device.type),
        "versions": _versions(),
        "commit": _commit(),
    }
    with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _versions() -> dict[str, str]:
    """Returns the installed versions by package; a package that is missing has none."""
    found = {
        "megatron-dwm": megatron_dwm.__version__,
        "python": platform.python_version(),
        "megatron-core": releases.version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Returns the commit of this package's source, with + if files differ; None outside git."""
    if not (_SOURCE / ".git").exists():
        return None
    found = _git("rev-parse", "HEAD")
    return found and found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> Any:
    command = ["git", "-C", str(_SOURCE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
