"""Describes this machine and installation without starting any process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dwm.runtime.fused import apex_finding, fused_pieces

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "sentencepiece", "lm-eval")
_SHARED_MEMORY = Path("/dev/shm")
_GIB = 2**30
# Compute capability of the first GPUs with FP8 matrix products (Ada).
_FP8_CAPABILITY = (8, 9)


def describe_machine() -> list[tuple[str, str]]:
    """Returns (name, finding) in the order in which a reader needs them."""
    return [
        ("python", platform.python_version()),
        *((name, _version(name)) for name in _PACKAGES),
        ("NVIDIA apex", apex_finding()),
        *fused_pieces(),
        ("devices", _devices()),
        ("bf16", _bf16()),
        ("fp8", _fp8()),
        ("backends", _backends()),
        ("threads", f"{torch.get_num_threads()} a process, {os.cpu_count()} cores"),
        ("memory", f"{_memory_gib():.1f} GiB"),
        ("shared memory", _shared_memory()),
        ("open files", _open_files()),
    ]


def multiplies_fp8(device: torch.device) -> bool:
    """True on GPUs whose cores multiply FP8 tensors: from Ada on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no GPU: CPU with gloo"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} GPU: {', '.join(sorted(set(names)))}"


def _bf16() -> str:
    if torch.cuda.is_available():
        return "yes" if torch.cuda.is_bf16_supported() else "no"
    flags = Path("/proc/cpuinfo")
    fast = flags.is_file() and "bf16" in flags.read_text(encoding="utf-8", errors="replace")
    return "in hardware" if fast else "emulated (slower than fp32)"


def _fp8() -> str:
    if not torch.cuda.is_available():
        return "no: needs a GPU"
    if torch.cuda.get_device_capability() < _FP8_CAPABILITY:
        return "no: needs compute capability 8.9"
    installed = importlib.util.find_spec("transformer_engine") is not None
    return "hardware yes, Transformer Engine " + ("installed" if installed else "missing")


def _backends() -> str:
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return ", ".join(name for name, available in checks.items() if available()) or "none"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB


def _shared_memory() -> str:
    if not _SHARED_MEMORY.is_dir():
        return "none"
    usage = shutil.disk_usage(_SHARED_MEMORY)
    return f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f}"


def _open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{soft} (up to {hard})"
