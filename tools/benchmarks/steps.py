"""`step`: our LLM step against plain Megatron-Core's, and weighted steps against uniform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.disk import DiskBatches, disk_batches
from benchmarks.settings import Settings
from benchmarks.subject import (
    ALONE,
    LLM,
    LOSSES,
    OWN,
    SIMILARITY,
    UNIFORM,
    Subject,
    build_subject,
    opened,
)
from benchmarks.table import heading, ratio_table
from benchmarks.timing import alternate, timed
from megatron_dwm.training import Ahead

PLAIN = "plain Megatron-Core loop"
CONTROL = "plain loop, again (noise)"
UNIFORM_STEP = "ours, uniform weights"
LLM_STEP = "ours, weights from the LLM's features"
DEFERRED_STEP = "ours, weights over the batch, divided after the pass (features)"
DISK_STEP = "ours, uniform weights, batches read from disk"
OWN_STEP = "ours, weights from an encoder of their own"
SIMILARITY_STEP = "ours, weights by similarity with a target"
LOSSES_STEP = "ours, weights by loss"
LEARNING_STEP = "ours, with an update on the training batch (features)"
AHEAD_STEP = "ours, with an update ahead: a quarter of the passages, all micro-batches probed"
HALF_STEP = "ours, with an update ahead: a quarter of the passages, half of the micro-batches"
FRESH_UPDATE = "an update on a fresh batch alone (features)"
UNIFORM_TARGET = "at most 1.010"
DEFERRED_TARGET = "at most 1.010"
DISK_TARGET = "at most 1.020"
LLM_TARGET = "at most 1.020"
AHEAD_TARGET = "at most 1.550"
HALF_TARGET = "at most 1.420"
_QUARTER = 0.25


def measure_steps(settings: Settings) -> None:
    """Print the table (main process)."""
    with opened(settings) as runtime:
        subject = build_subject(settings, runtime)
        rounds = settings.repeats + settings.warm_up
        with disk_batches(settings, runtime, rounds) as batches:
            times_s = _times(subject, settings, batches)
        if runtime.is_main:
            print(heading(settings, runtime, subject.num_parameters), end="\n\n")
            print(_table(times_s), flush=True)


def _times(subject: Subject, settings: Settings, batches: DiskBatches) -> dict[str, list[float]]:
    whole = Ahead(fraction=1.0)
    runs: dict[str, Callable[[], object]] = {
        PLAIN: subject.plain_step,
        CONTROL: subject.plain_step,
        UNIFORM_STEP: partial(subject.step, UNIFORM),
        LLM_STEP: partial(subject.step, LLM),
        DEFERRED_STEP: partial(subject.step, ALONE),
        DISK_STEP: lambda: subject.step(UNIFORM, batches.next()),
        OWN_STEP: partial(subject.step, OWN),
        SIMILARITY_STEP: partial(subject.step, SIMILARITY),
        LOSSES_STEP: partial(subject.step, LOSSES),
        LEARNING_STEP: subject.learning_step,
        FRESH_UPDATE: partial(subject.weighting_update, LLM),
        AHEAD_STEP: partial(subject.learning_step, LLM, ahead=whole, passages=_QUARTER),
    }
    if subject.train.size > settings.micro_batch:
        half = Ahead(fraction=0.5)
        runs[HALF_STEP] = partial(subject.learning_step, LLM, ahead=half, passages=_QUARTER)
    return alternate(
        [timed(name, call, subject.runtime) for name, call in runs.items()],
        repeats=settings.repeats,
        warm_up=settings.warm_up,
        shown=subject.runtime.is_main,
    )


def _table(times_s: dict[str, list[float]]) -> str:
    compared = [
        (PLAIN, PLAIN, ""),
        (CONTROL, PLAIN, "(1.000)"),
        (UNIFORM_STEP, PLAIN, UNIFORM_TARGET),
        (LLM_STEP, UNIFORM_STEP, LLM_TARGET),
        (DEFERRED_STEP, UNIFORM_STEP, DEFERRED_TARGET),
        (DISK_STEP, UNIFORM_STEP, DISK_TARGET),
        (OWN_STEP, UNIFORM_STEP, ""),
        (SIMILARITY_STEP, UNIFORM_STEP, LLM_TARGET),
        (LOSSES_STEP, UNIFORM_STEP, LLM_TARGET),
        (LEARNING_STEP, UNIFORM_STEP, ""),
        (FRESH_UPDATE, UNIFORM_STEP, ""),
        (AHEAD_STEP, LLM_STEP, AHEAD_TARGET),
    ]
    if HALF_STEP in times_s:
        compared.append((HALF_STEP, LLM_STEP, HALF_TARGET))
    return ratio_table("one step", times_s, compared)
