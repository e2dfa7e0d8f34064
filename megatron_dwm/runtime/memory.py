"""Memory of this process."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most memory so far: allocated on a GPU, or resident on a CPU.

    None where the system does not say (no Linux). `ru_maxrss` is not it: it starts at the peak of
    the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int | None:
    """Returns a field of /proc/self/status, whose sizes are in KiB."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
