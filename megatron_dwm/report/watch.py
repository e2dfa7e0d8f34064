"""Writes the page again whenever files of its runs have changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_dwm.config.printing import printable
from megatron_dwm.report.run_files import NotYet
from megatron_dwm.report.run_report import Request, contents_of, read_runs, write_page

_FILES = (
    *("metrics.jsonl", "config.yaml", "starts.jsonl", "evaluation/*.json"),
    *("weights/*.parquet", "token_weights/*.parquet"),
)
State = frozenset[tuple[Path, int, int]]


def watch(request: Request, interval_s: float) -> None:
    """Write the page, and again after each change, looking every `interval_s`, until Ctrl-C.

    A run that has no finished line yet is waited for; other mistakes of the user end it.
    """
    written: State | None = None
    print(f"watching; Ctrl-C ends it; open {printable(request.page)}", file=sys.stderr)
    try:
        while True:
            state = state_of((request.run_dir, *request.compare))
            if state != written:
                _write(request, interval_s)
                written = state
            time.sleep(interval_s)
    except KeyboardInterrupt:
        print("no longer watching", file=sys.stderr)


def _write(request: Request, interval_s: float) -> None:
    try:
        runs = replace(read_runs(request), with_tables=False)
    except NotYet as error:
        print(printable(f"waiting: {error}"), file=sys.stderr)
        return
    write_page(request, runs, contents_of(runs), reload_s=interval_s)
    step = runs.main.metrics[-1]["step"]
    print(printable(f"{request.page}: step {step:,}"), flush=True)


def state_of(run_dirs: Iterable[Path]) -> State:
    """Returns size and time of change of every file that the page is made from."""
    return frozenset(_entries(run_dirs))


def _entries(run_dirs: Iterable[Path]) -> Iterator[tuple[Path, int, int]]:
    for path in (path for run in run_dirs for name in _FILES for path in run.glob(name)):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # replaced at this moment; the next look sees the new one
        yield path, found.st_size, found.st_mtime_ns
