"""Notes every start of a run: when, where, by which command, with which versions."""

from __future__ import annotations

import hashlib
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
from megatron_dwm.config.plugins import is_plugin, source_of_plugin
from megatron_dwm.runtime import Runtime, releases
from megatron_dwm.runtime.warn import print_warning

STARTS_FILE = "starts.jsonl"
_PACKAGES = ("torch", "numpy", "transformer-engine")
_SOURCE = Path(megatron_dwm.__file__).parent.parent


def note_start_of_job(run_dir: Path, step: int, runtime: Runtime, policy: str) -> None:
    """Append a line to `starts.jsonl`; warns if a method outside the package was changed.

    step: from which the run goes on. policy: `policy.name`. Raises OSError.
    """
    source = _source(policy)
    _warn_of_another_source(run_dir, policy, source)
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
        **({} if source is None else {"policy_source": source}),
    }
    with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _source(policy: str) -> dict[str, str] | None:
    """Returns path and SHA-256 of the file of a method outside the package."""
    file = source_of_plugin(policy) if is_plugin(policy) else None
    if file is None:
        return None
    return {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _warn_of_another_source(run_dir: Path, policy: str, source: dict[str, str] | None) -> None:
    before = _last_source(run_dir / STARTS_FILE)
    if source is not None and before is not None and before["sha256"] != source["sha256"]:
        print_warning(
            f"policy.name {policy}: {source['file']} has changed since the run's last start "
            f"(SHA-256 {before['sha256'][:16]}, now {source['sha256'][:16]}); the run goes on with "
            "the new code"
        )


def _last_source(file: Path) -> dict[str, str] | None:
    """Returns what the last line of `starts.jsonl` says of the method's file, if anything."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        found = json.loads(lines[-1]).get("policy_source") if lines else None
    except ValueError:  # cut short by a kill
        return None
    return found


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
