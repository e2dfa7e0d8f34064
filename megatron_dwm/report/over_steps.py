"""Figures of a quantity over the run: one line for each group of runs, or for each domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dwm.report.charts import lines
from megatron_dwm.report.content import Cell, Column, Figure, columnar
from megatron_dwm.report.curves import Value, abscissas, group_rows, stage_marks
from megatron_dwm.report.runs import RunSet

# A page with more panels, or a plot with more lines, cannot be read; their data are in the CSV.
MAX_PANELS = 24
MAX_LINES = 21
FEW_POINTS = 2


def over_steps(
    runs: RunSet,
    *,
    id: str,
    title: str,
    caption: str,
    y: Column,
    phase: str,
    value: Value,
    reference: float | None = None,
) -> Figure | None:
    """Returns a figure with a line for each group; None if no run has the value.

    Args:
        runs: the runs.
        id, title, caption: of the figure.
        y: the quantity.
        phase: lines of `metrics.jsonl` to take.
        value: takes the number from such a line.
        reference: value of a dashed horizontal line.
    """
    rows: list[list[Cell]] = [
        [group.name, *row] for group in runs.groups for row in group_rows(runs, group, phase, value)
    ]
    if not rows:
        return None
    series = Column(name="run", title="run")
    columns = _columns(runs, y, [series])
    names = [group.name for group in runs.groups]
    look = _look(runs, rows, [series])
    return Figure(
        id=id,
        title=title,
        caption=caption,
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(y, color="run", names=names, reference=reference, **look),
        series="run",
        names=names,
        marks=_marks(runs),
    )


def by_panel(
    runs: RunSet,
    panels: Mapping[str, tuple[str, Value]],
    *,
    id: str,
    title: str,
    caption: str,
    y: Column,
    panel: Column,
    reference: float | None = None,
) -> Figure | None:
    """Returns a figure of several plots, each with a line for each group; None if all are empty.

    Args:
        runs: the runs.
        panels: phase and value of each plot, by its name, in order.
        id, title, caption: of the figure.
        y: the quantity.
        panel: what the plots differ in.
        reference: value of a dashed horizontal line.
    """
    rows: list[list[Cell]] = [
        [name, group.name, *row]
        for name, (phase, value) in list(panels.items())[:MAX_PANELS]
        for group in runs.groups
        for row in group_rows(runs, group, phase, value)
    ]
    if not rows:
        return None
    series = Column(name="run", title="run")
    columns = _columns(runs, y, [panel, series])
    names = [group.name for group in runs.groups]
    look = _look(runs, rows, [panel, series])
    shown = list(dict.fromkeys(str(row[0]) for row in rows))
    return Figure(
        id=id,
        title=title,
        caption=caption + _left_out(len(panels)),
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(y, color="run", names=names, reference=reference, **look),
        series="run",
        names=names,
        panels=panel.name,
        panel_names=shown,
        marks=_marks(runs),
    )


def present(figures: Sequence[Figure | None]) -> list[Figure]:
    """Returns the figures that have data."""
    return [figure for figure in figures if figure is not None]


def _columns(runs: RunSet, y: Column, before: Sequence[Column]) -> tuple[Column, ...]:
    edges = [Column(name=name, title=f"{y.title}, {name}", unit=y.unit) for name in ("low", "high")]
    return (*before, *abscissas(runs), y, *edges)


def _look(
    runs: RunSet, rows: Sequence[Sequence[Cell]], columns: Sequence[Column]
) -> dict[str, Any]:
    """Returns the options of `lines` that depend on the data.

    columns: those whose values tell the lines apart; the first of the rows.
    """
    several = any(len(group.runs) > 1 for group in runs.groups)
    names = [column.name for column in columns]
    return {"band": several, "dotted": dotted(names, rows), "marks": bool(_marks(runs))}


def dotted(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[dict[str, str]]:
    """Returns the lines that have one or two points, which could not be seen as a line.

    columns: names of the first cells of the rows, which tell the lines apart.
    """
    counts = Counter(tuple(str(cell) for cell in row[: len(columns)]) for row in rows)
    few = [line for line, count in counts.items() if count <= FEW_POINTS]
    return [dict(zip(columns, line, strict=True)) for line in few]


def _marks(runs: RunSet) -> dict[str, list[Cell]]:
    """Returns the stages' beginnings of the main run; none if several runs are compared."""
    if runs.compared:
        return {}
    marks = stage_marks(runs.main, runs)
    return marks if marks["step"] else {}


def about_bands(runs: RunSet) -> str:
    """Returns what bands mean, if there are any: for the sentence under a section's title."""
    if not any(len(group.runs) > 1 for group in runs.groups):
        return ""
    return "Lines are means over seeds; bands reach from the lowest to the highest run."


def _left_out(count: int) -> str:
    if count <= MAX_PANELS:
        return ""
    return f" Shown are {MAX_PANELS} of {count}."
