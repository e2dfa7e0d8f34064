"""Ranges with the names of the loop's phases, for three profiling tools.

    torch   torch's profiler; one trace a rank in RUN_DIR/profile, for Perfetto or chrome://tracing
    nvtx    NVTX ranges, and the CUDA profiler on for the chosen steps only:
            nsys profile --capture-range=cudaProfilerApi ... python -m megatron_dwm.pretrain ...
    dlprof  the same ranges after DLProf's own annotations: dlprof --mode=pytorch ...

`phase` is torch's `record_function`, which all three show. Cost: about a microsecond per phase
without profiling. The torch profiler slows the steps that it records; the others hardly do.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_dwm.config import ProfilingConfig, UserError

# From NVIDIA's own package index; nvidia-dlprof on PyPI is an empty placeholder.
DLPROF_MODULE = "nvidia_dlprof_pytorch_nvtx"

Phase = Literal[
    "step",
    "pool",
    "weighted gradient",
    "optimizer step",
    "weighting update",
    "hypergradient",
    "virtual step",
    "validation gradient",
    "direction",
    "restore",
    "tangent probe",
    "finite difference",
    "unroll",
    "weighting model",
    "evaluation",
    "checkpoint",
]


def phase(name: Phase) -> record_function:
    """Returns a context, or function decorator, whose range has the name `name` in every tool."""
    return record_function(name)


def check_profiling(config: ProfilingConfig) -> None:
    """Raise UserError if this machine cannot run the configured profiling tool."""
    if config.tool == "dlprof" and importlib.util.find_spec(DLPROF_MODULE) is None:
        raise UserError(
            f"profiling.tool dlprof: needs NVIDIA's {DLPROF_MODULE}, which is not installed (it is "
            "retired, and PyPI has a placeholder only); use nvtx with Nsight Systems"
        )
    if config.tool in ("nvtx", "dlprof") and not torch.cuda.is_available():
        raise UserError(
            f"profiling.tool {config.tool}: needs a GPU, and none is here; torch profiles on a CPU"
        )


class Window:
    """The steps of a run that this rank profiles."""

    def __init__(self, config: ProfilingConfig, directory: Path, rank: int) -> None:
        """directory: for the traces; the first trace creates it."""
        self.config = config
        self.directory = directory
        self.rank = rank
        self.wanted = config.tool != "none" and rank in config.ranks
        self._open: ExitStack | None = None
        if self.wanted and config.tool == "dlprof":
            importlib.import_module(DLPROF_MODULE).init()

    def before_step(self, number: int) -> None:
        """Open or close the window before step `number`, from 1; a weighting update belongs to the
        step that follows it.
        """
        if not self.wanted:
            return
        inside = self.config.first_step <= number <= self.config.last_step
        if inside and self._open is None:
            self._open = ExitStack()
            if self.config.tool == "torch":
                self._record()
            else:
                self._annotate()
        elif not inside:
            self.close()

    def close(self) -> None:
        """Stop profiling, and write the trace."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _record(self) -> None:
        assert self._open is not None
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        recording = profile(activities=activities)
        # Registered first, so it runs last: the trace is written after the recording has ended.
        self._open.callback(lambda: recording.export_chrome_trace(str(self._free_file())))
        self._open.enter_context(recording)

    def _annotate(self) -> None:
        assert self._open is not None
        # nsys --capture-range=cudaProfilerApi records from here to the end of the window.
        self._open.enter_context(torch.cuda.profiler.profile())
        self._open.enter_context(emit_nvtx())

    def _free_file(self) -> Path:
        """Returns an unused file name, because a resumed run may profile the same steps again."""
        self.directory.mkdir(parents=True, exist_ok=True)
        stem = f"rank_{self.rank}_steps_{self.config.first_step}_{self.config.last_step}"
        names = [stem, *(f"{stem}_{number}" for number in range(1, 1000))]
        files = (self.directory / f"{name}.json.gz" for name in names)
        return next(file for file in files if not file.exists())
