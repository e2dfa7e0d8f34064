"""What a section of the report consists of: figures, tables and notes; records only.

A section is a function from the runs to a `Content` (sections/__init__.py lists them). It draws
nothing itself: charts.py describes how a figure looks, images.py makes its PNG, page.py the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dwm.report.runs import RunSet

Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a figure's data or of a table.

    name: key in the data; a Python identifier.
    title: what the quantity is called on axes and as a heading.
    unit: its unit; empty for names and counts.
    """

    name: str
    title: str
    unit: str = ""

    @property
    def label(self) -> str:
        """The title with the unit in parentheses, as on an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot and its data: the same on the page, as PNG and as CSV.

    id: name of its PNG and CSV files; unique on the page; letters, digits, `_`.
    caption: what the reader sees in it, in a sentence or two.
    columns: of `data`, in the order of the CSV file.
    data: values by column name, all of one length. Columns named `step`, `tokens`, `flops` and
        `time` are abscissas: if the chart's x is `step`, the page can replace it by the others.
    chart: a Vega-Lite description without data, as charts.py returns it.
    series: name of the column whose values have a color each, or None.
    names: values of `series` in the order of their colors; those without data may be left out.
    panels: name of the column that divides the data among plots side by side, or None.
    panel_names: values of `panels`, in order.
    marks: data of the vertical lines (`step`, `tokens`, `flops`, `time`), if the chart has them.
    wide: takes the whole width of the page; panels always do.
    """

    id: str
    title: str
    caption: str
    columns: Sequence[Column]
    data: Mapping[str, Sequence[Cell]]
    chart: Mapping[str, Any]
    series: str | None = None
    names: Sequence[str] = ()
    panels: str | None = None
    panel_names: Sequence[str] = ()
    marks: Mapping[str, Sequence[Cell]] = field(default_factory=dict)
    wide: bool = False

    def __post_init__(self) -> None:
        """Check that the data are a table."""
        assert {column.name for column in self.columns} == set(self.data), self.id
        assert len({len(values) for values in self.data.values()}) == 1, self.id

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return len(next(iter(self.data.values())))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text and numbers; None is shown as a dash."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A number that is shown large, at the top of its section."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Content:
    """One section of the page.

    id: anchor on the page; letters, digits, `-`.
    lead: a sentence under the title; may be empty.
    notes: what is missing and why, and what the reader should know; a sentence each.
    template: file in report/page/ that is rendered below the figures with `values`, for what
        figures and tables cannot show. Its text is escaped like everything else.
    """

    id: str
    title: str
    lead: str = ""
    cards: Sequence[Card] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    template: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


class Section(Protocol):
    """Computes one section from the runs that were read."""

    def __call__(self, runs: RunSet) -> Content | None:
        """Returns the section, or None if there is nothing to say about these runs.

        Data that are missing raise nothing: the section notes them.
        """
        ...


def columnar(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> dict[str, list[Cell]]:
    """Returns rows as values by column name; numbers have seven digits, NaN and infinity are None.

    Seven digits are what float32 has; more would only enlarge the page.
    """
    names = [column.name for column in columns]
    return {name: [_short(row[i]) for row in rows] for i, name in enumerate(names)}


def _short(value: Cell) -> Cell:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None
