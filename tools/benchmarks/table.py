"""Markdown tables, and the command line that makes them again."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.settings import Settings
from benchmarks.timing import Ratio, ratio
from megatron_dwm.runtime import Runtime

# (name of a measurement, name of the one it is divided by, what is aimed at)
Comparison = tuple[str, str, str]
RATIO_COLUMNS = ("ms (median)", "of", "ratio", "quartiles", "ratio of the fastest", "target")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; every row has one cell a column."""
    assert all(len(row) == len(columns) for row in rows)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio_cells(median_ms: float, of: str, found: Ratio, target: str = "") -> list[str]:
    """Returns the cells of RATIO_COLUMNS."""
    return [
        f"{median_ms:.1f}",
        of,
        f"{found.median:.3f} ± {found.error:.3f}",
        f"{found.low:.3f} to {found.high:.3f}",
        f"{found.of_fastest:.3f}",
        target,
    ]


def ratio_table(
    first_column: str, times_s: Mapping[str, Sequence[float]], compared: Iterable[Comparison]
) -> str:
    """Returns a row for every comparison of two of `times_s`, which were taken in turn."""
    rows = [
        [
            name,
            *_ratio_cells(
                1e3 * statistics.median(times_s[name]),
                base,
                ratio(times_s[name], times_s[base]),
                target,
            ),
        ]
        for name, base, target in compared
    ]
    return markdown((first_column, *RATIO_COLUMNS), rows)


def heading(settings: Settings, runtime: Runtime, num_parameters: int) -> str:
    """Returns the command, the machine, and its load at the end."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            f"`{command()}`",
            "",
            f"{num_parameters / 1e6:.2f}M parameters, {settings.batch * settings.sequence} tokens "
            f"a step, {settings.precision}, {runtime.world_size} process(es) on "
            f"{runtime.device.type}, {torch.get_num_threads()} thread(s) each, {settings.repeats} "
            f"rounds after {settings.warm_up} to warm up, load average {load} (1, 5, 15 min) on "
            f"{os.cpu_count()} cores. A ratio is the median over rounds of "
            "times taken in turn, with its standard error.",
        ]
    )


def command() -> str:
    """Returns the command line that made the table."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    world_size = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    program = f"torchrun --nproc-per-node {world_size}" if world_size else "python"
    return f"{prefix}{program} tools/benchmark.py {' '.join(sys.argv[1:])}"
