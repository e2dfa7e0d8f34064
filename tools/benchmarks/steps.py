"""`step`: our LLM step against plain Megatron-Core's, and weighted against uniform."""

from __future__ import annotations

import statistics

from benchmarks.settings import Settings
from benchmarks.subject import Subject, build_subject, opened
from benchmarks.table import RATIO_COLUMNS, heading, markdown, ratio_cells
from benchmarks.timing import alternate, ratio, timed

PLAIN = "plain Megatron-Core loop"
CONTROL = "plain loop, again (noise)"
UNIFORM = "ours, uniform weights"
DWM = "ours, the weighting model's weights"
UNIFORM_TARGET = "at most 1.010"


def measure_steps(settings: Settings) -> None:
    """Print the table (main process)."""
    with opened(settings) as runtime:
        subject = build_subject(settings, runtime)
        times_s = _times(subject, settings)
        if runtime.is_main:
            print(
                heading(settings, runtime, subject.session.llm.shape.num_parameters()), end="\n\n"
            )
            print(_table(times_s), flush=True)


def _times(subject: Subject, settings: Settings) -> dict[str, list[float]]:
    runs = {
        PLAIN: subject.plain_step,
        CONTROL: subject.plain_step,
        UNIFORM: subject.uniform_step,
        DWM: subject.dwm_step,
    }
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
        (UNIFORM, PLAIN, UNIFORM_TARGET),
        (DWM, UNIFORM, ""),
    ]
    rows = [
        [
            name,
            *ratio_cells(
                1e3 * statistics.median(times_s[name]),
                base,
                ratio(times_s[name], times_s[base]),
                target,
            ),
        ]
        for name, base, target in compared
    ]
    return markdown(("one step", *RATIO_COLUMNS), rows)
