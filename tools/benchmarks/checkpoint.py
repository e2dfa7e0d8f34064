"""`checkpoint`: what a save costs, against torch.save of the same tensors and a copy of them.

Every save of ours ends with checksums, a manifest and a rename, and its files are forced to the
disk; torch.save is measured without and with that. The plan of a save is checked once in a run, so
not here. An asynchronous save holds training up for what is timed here; its writing is then waited
for outside the clock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_dwm.training.checkpoint import CheckpointSave
from megatron_dwm.training.session import Session
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.subject import UNIFORM, Subject, build_subject, opened
from benchmarks.table import heading, ratio_table
from benchmarks.timing import Clock, Contestant, alternate, timed
from megatron_dwm.checkpoint.sharded_plan import SavePlan
from megatron_dwm.config import RunConfig

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
            parameters = subject.session.llm.shape.num_parameters()
            print(heading(settings, runtime, parameters), end="\n\n")
            print(f"{size_bytes / 2**20:.1f} MiB of tensors in this process.\n")
            print(_table(times_s), flush=True)


def _times(
    subject: Subject, settings: Settings, folder: Path
) -> tuple[dict[str, list[float]], int]:
    runtime = subject.runtime
    tensors = _tensors(subject.session)
    config = replace(subject.session.config, run=RunConfig(dir=str(folder)))
    session = replace(subject.session, config=config)
    plan = SavePlan()
    plain = folder / f"plain_{runtime.rank}.pt"
    contestants = [
        timed(PLAIN, lambda: torch.save(tensors, plain), runtime),
        timed(FORCED, lambda: _forced(tensors, plain), runtime),
        timed(COPY, lambda: [tensor.cpu().clone() for tensor in tensors], runtime),
        timed(SAVE, lambda: CheckpointSave(_next(session), {}, plan=plan).finish(), runtime),
        _stall(session, plan),
    ]
    contestants = [_then_emptied(run, folder / "checkpoints") for run in contestants]
    times_s = alternate(
        contestants,
        repeats=settings.repeats,
        warm_up=settings.warm_up,
        shown=runtime.is_main,
    )
    return times_s, sum(tensor.nbytes for tensor in tensors)


def _tensors(session: Session) -> list[Tensor]:
    """Parameters, main parameters and moments of this process."""
    found = [parameter.detach() for parameter in session.llm.parameters()]
    for member in session.optimizer.chained_optimizers:
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


def _next(session: Session) -> Session:
    """The session a step further: every checkpoint of a run has a name of its own."""
    session.state.step += 1
    return session


def _stall(session: Session, plan: SavePlan) -> Contestant:
    def run() -> dict[str, float]:
        session.runtime.barrier()
        clock = Clock(session.runtime.device)
        under_way = CheckpointSave(_next(session), {}, plan=plan, background=True)
        held_up_s = clock.lap()
        under_way.finish()
        return {STALL: held_up_s}

    return run


def _then_emptied(run: Contestant, folder: Path) -> Callable[[], dict[str, float]]:
    """Without what a contestant leaves, so that the disk of a long benchmark does not fill up."""

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
