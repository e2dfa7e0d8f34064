"""`checkpoint`: what a save costs, against torch.save of the same tensors and a copy of them.

Every save of ours ends with checksums, a manifest and a rename, and its files are forced to the
disk; torch.save is measured without and with that. The plan of a save is checked once in a run, so
not here. Of an asynchronous save the time is measured for which training stands still; the wait for
its files is not.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.subject import UNIFORM, Subject, build_subject, opened
from benchmarks.table import heading, ratio_table
from benchmarks.timing import Clock, Contestant, alternate, timed
from megatron_dwm.checkpoint.names import CONFIG_FILE, SHAPE_FILE
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.save import CheckpointSave
from megatron_dwm.checkpoint.sharded_plan import SavePlan
from megatron_dwm.config.load import config_text
from megatron_dwm.training import Learner

PLAIN = "torch.save of the same tensors"
FORCED = "torch.save, forced to the disk"
COPY = "copy of the tensors in host memory"
SAVE = "checkpoint"
STALL = "asynchronous checkpoint: training stands still"


def measure_checkpoints(settings: Settings) -> None:
    """Print the table (main process)."""
    with opened(settings) as runtime, tempfile.TemporaryDirectory() as folder:
        place = [folder]
        dist.broadcast_object_list(place)
        subject = build_subject(settings, runtime)
        subject.step(UNIFORM)  # Adam's moments are made by the first step
        times_s, size_bytes = _times(subject, settings, Path(place[0]))
        if runtime.is_main:
            print(heading(settings, runtime, subject.num_parameters), end="\n\n")
            print(f"{size_bytes / 2**20:.1f} MiB of tensors in this process.\n")
            print(_table(times_s), flush=True)


def _times(
    subject: Subject, settings: Settings, folder: Path
) -> tuple[dict[str, list[float]], int]:
    runtime = subject.runtime
    tensors = _tensors(subject.learner)
    save = partial(_save, _parts(subject), folder, {})
    plain = folder / f"plain_{runtime.rank}.pt"
    contestants = [
        timed(PLAIN, lambda: torch.save(tensors, plain), runtime),
        timed(FORCED, lambda: _forced(tensors, plain), runtime),
        timed(COPY, lambda: [tensor.cpu().clone() for tensor in tensors], runtime),
        timed(SAVE, lambda: save(background=False).finish(), runtime),
        _stall(subject, save),
    ]
    contestants = [_then_emptied(run, folder / "checkpoints") for run in contestants]
    times_s = alternate(
        contestants,
        repeats=settings.repeats,
        warm_up=settings.warm_up,
        shown=runtime.is_main,
    )
    return times_s, sum(tensor.nbytes for tensor in tensors)


def _tensors(learner: Learner) -> list[Tensor]:
    """Returns the parameters, main parameters and moments of this process."""
    found = [parameter.detach() for parameter in learner.llm.parameters()]
    for member in learner.optimizer.chained_optimizers:
        for main, state in member.optimizer.state.items():
            if main.data_ptr() not in {tensor.data_ptr() for tensor in found}:
                found.append(main.detach())
            found += [value for value in state.values() if isinstance(value, Tensor)]
    return found


def _forced(tensors: list[Tensor], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _parts(subject: Subject) -> Parts:
    """Returns what a run with uniform weights saves, its small files included."""
    files: dict[str, bytes] = {}
    if subject.runtime.is_main:
        files = {
            CONFIG_FILE: config_text(subject.config).encode(),
            SHAPE_FILE: json.dumps(asdict(subject.learner.llm.shape)).encode(),
        }
    return Parts(
        llm=subject.learner.llm,
        optimizer=subject.learner.optimizer,
        method_name=UNIFORM,
        method=subject.methods[UNIFORM],
        state=subject.state,
        files=files,
    )


def _save(
    parts: Parts, folder: Path, plans: dict[str, SavePlan], *, background: bool
) -> CheckpointSave:
    """Begin a checkpoint a step after the one before: each one of a run has its own name."""
    parts.state.step += 1
    return CheckpointSave(parts, folder, {}, plans=plans, background=background)


def _stall(subject: Subject, save: Callable[..., CheckpointSave]) -> Contestant:
    def run() -> dict[str, float]:
        subject.runtime.barrier()
        clock = Clock(subject.runtime.device)
        under_way = save(background=True)
        held_up_s = clock.lap()
        under_way.finish()
        return {STALL: held_up_s}

    return run


def _then_emptied(run: Contestant, folder: Path) -> Callable[[], dict[str, float]]:
    """Returns the contestant with its files removed after each run, which keeps the disk free."""

    def emptied() -> dict[str, float]:
        found = run()
        shutil.rmtree(folder, ignore_errors=True)
        return found

    return emptied


def _table(times_s: dict[str, list[float]]) -> str:
    compared = [
        (PLAIN, PLAIN, ""),
        (FORCED, PLAIN, ""),
        (SAVE, PLAIN, "at most 2.000"),
        (SAVE, FORCED, ""),
        (COPY, PLAIN, ""),
        (STALL, COPY, "at most 1.000"),
        (STALL, SAVE, ""),
    ]
    return ratio_table("one save", times_s, compared)
