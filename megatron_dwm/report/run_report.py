"""Writes the report of a run into `RUN/report/`: report.html, and a PNG of every figure."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents
from megatron_dwm.config.printing import printable
from megatron_dwm.files.atomic import write_bytes, write_text
from megatron_dwm.report.content import Content
from megatron_dwm.report.groups import grouped
from megatron_dwm.report.long_names import with_short_names
from megatron_dwm.report.older_figures import remove_older
from megatron_dwm.report.runs import RunSet, baseline_of, read_run, run_names, target_of
from megatron_dwm.report.scores import read_scores


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a report is about.

    run_dir: the run whose weights are shown; the report is written into it.
    compare: other runs.
    target: held-out domain to show first; None takes the one called "target", if there is one.
    baseline: run that others are compared with; None takes the first of uniform weights.
    scores: files of tools/evaluate.py, `FILE.json` or `RUN=FILE.json`.
    """

    run_dir: Path
    compare: Sequence[Path] = ()
    target: str | None = None
    baseline: str | None = None
    scores: Sequence[str] = ()

    @property
    def page(self) -> Path:
        """The page's file."""
        return self.run_dir / "report" / "report.html"


def write_report(request: Request) -> list[Path]:
    """Write the page and a PNG of every figure; returns their paths, the page first.

    Raises:
        UserError: a directory is not a run, a file in it is broken, or a name is not known.
    """
    runs = read_runs(request)
    contents = contents_of(runs)
    images = write_images(request, contents)
    tables = write_tables(request, runs)
    write_page(request, runs, contents)
    return [request.page, *images, *tables]


def read_runs(request: Request) -> RunSet:
    """Returns the runs of a report. Raises as `write_report`."""
    paths = (request.run_dir, *request.compare)
    runs = [read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    groups = grouped(runs)
    return RunSet(
        runs=runs,
        groups=groups,
        baseline=baseline_of(groups, request.baseline),
        target=target_of(runs, request.target),
        scores=read_scores(runs, request.scores),
    )


def contents_of(runs: RunSet) -> list[Content]:
    """Returns the sections that have something to say, in the order of the page."""
    from megatron_dwm.report.sections import SECTIONS

    found = [section(runs) for section in SECTIONS]
    return [with_short_names(content) for content in found if content is not None]


def write_page(
    request: Request,
    runs: RunSet,
    contents: Sequence[Content],
    *,
    reload_s: float | None = None,
) -> None:
    """Write report.html, in place of an older one; `reload_s` as in `html_page`."""
    from megatron_dwm.report.page import html_page

    _require_folder(request.page.parent)
    title = " · ".join(run.name for run in runs.runs[:3])
    more = f" and {len(runs.runs) - 3} more" if len(runs.runs) > 3 else ""
    write_text(request.page, html_page(f"{title}{more}", contents, reload_s=reload_s))


def write_images(request: Request, contents: Sequence[Content]) -> list[Path]:
    """Write a PNG of every figure, in place of older ones; returns their paths."""
    from megatron_dwm.report.images import png

    folder = request.page.parent
    _require_folder(folder)
    written = []
    for figure in (figure for content in contents for figure in content.figures):
        path = folder / f"{figure.id}.png"
        if path.is_dir():
            raise UserError(f"{path} is a directory, expected a file; move it away")
        write_bytes(path, png(figure))
        written.append(path)
    remove_older(folder, [path.name for path in written])
    return written


def write_tables(request: Request, runs: RunSet) -> list[Path]:
    """Write the credit of every document, if there is any; returns the paths."""
    from megatron_dwm.report.credit import write_credit
    from megatron_dwm.report.sections.credit import CREDIT_FILE

    found, path = runs.documents, request.page.parent / CREDIT_FILE
    if found is None or not found.sums.aligned_K.any():
        return []
    write_credit(path, found.over_stages, found.weights.domains, found.corpus)
    return [path]


def _require_folder(folder: Path) -> None:
    """Create the report's folder in the run's directory, unless that name exists."""
    if not os.path.lexists(folder):
        require_writable_parents([folder])
        folder.mkdir()
    page = folder / "report.html"
    require_writable_parents([page])
    if page.is_dir():
        raise UserError(f"{page} is a directory, expected a file; move it away")


def print_notes(contents: Sequence[Content]) -> None:
    """Print what is missing, one line each, on standard error."""
    for content in contents:
        for note in content.notes:
            print(printable(note), file=sys.stderr)
