"""Peak memory of a plain step, an update and an unrolled update, each in a process of its own.

Only a process of its own has a peak of its own. A child brings the runtime up, notes its memory,
builds the model, takes plain steps until the optimizer has its state, then does the measured thing
twice. What counts is the peak above what was noted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.settings import Settings
from benchmarks.table import markdown
from megatron_dwm.runtime import world_size_from_environment

PLAIN = "plain training step"
UPDATE = "hypergradient (tangent probe)"
UNROLL = "hypergradient (unroll)"
_TARGETS = {"fp32": "at most 1.500", "bf16": "at most 1.300"}
_UNROLL_TARGET = "at least 2.000"
PEAK_COLUMNS = ("peak memory", "MiB (median)", "of", "ratio", "smallest to largest", "target")
_MIB = 2**20
_REPETITIONS = 2
_TOOLS = Path(__file__).resolve().parent.parent


def memory_table(settings: Settings, repeats: int) -> str:
    """Returns the table, or the reason why there is none; starts `repeats` processes a row."""
    if world_size_from_environment() > 1:
        return "Peak memory: measured only in a run of one process."
    if repeats == 0:
        return "Peak memory: not measured (--memory-repeats 0)."
    kinds = [PLAIN, UPDATE] + ([UNROLL] if settings.precision == "fp32" else [])
    peaks: dict[str, list[int]] = {kind: [] for kind in kinds}
    for number in range(repeats):
        for kind in kinds:
            print(f"memory {number + 1}/{repeats}: {kind}", file=sys.stderr, flush=True)
            peaks[kind].append(peak_of_child("benchmarks.memory", kind, settings))
    rows = [
        peak_row(PLAIN, peaks[PLAIN], PLAIN, peaks[PLAIN], ""),
        peak_row(UPDATE, peaks[UPDATE], PLAIN, peaks[PLAIN], _TARGETS.get(settings.precision, "")),
    ]
    if UNROLL in peaks:
        rows.append(peak_row(UNROLL, peaks[UNROLL], PLAIN, peaks[PLAIN], ""))
        label = "unroll against tangent probe"
        rows.append(peak_row(label, peaks[UNROLL], UPDATE, peaks[UPDATE], _UNROLL_TARGET))
    return markdown(PEAK_COLUMNS, rows)


def peak_row(label: str, peaks: list[int], of: str, base: list[int], target: str) -> list[str]:
    """Returns the cells of PEAK_COLUMNS."""
    ratios = [peak / base_peak for peak, base_peak in zip(peaks, base, strict=True)]
    return [
        label,
        f"{statistics.median(peaks) / _MIB:.1f}",
        of,
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        target,
    ]


def peak_of_child(module: str, kind: str, settings: Settings) -> int:
    """Returns the peak bytes of `kind` that `module` prints, started as a program with both."""
    python_path = os.pathsep.join([str(_TOOLS), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", module, kind, json.dumps(asdict(settings))],
        env={**os.environ, "PYTHONPATH": python_path, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {kind} failed:\n{child.stderr}")
    return int(child.stdout.split()[-1])


def _measure(kind: str, settings: Settings) -> int:
    """Returns the peak bytes of `kind` above a process without a model."""
    from benchmarks.subject import build_subject, opened

    with opened(settings) as runtime:
        before = used_bytes(runtime.device)
        subject = build_subject(settings, runtime)
        measured: dict[str, Callable[[], object]] = {
            PLAIN: subject.plain_step,
            UPDATE: subject.hypergradient,
            UNROLL: lambda: subject.hypergradient("unroll"),
        }
        for call in (subject.plain_step, measured[kind]):
            for _ in range(_REPETITIONS):
                call()
        return peak_bytes(runtime.device) - before


def used_bytes(device: torch.device) -> int:
    """Returns what this process has now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Returns this process's peak; ru_maxrss would start at the parent process's peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


if __name__ == "__main__":
    print(_measure(sys.argv[1], Settings(**json.loads(sys.argv[2]))))
