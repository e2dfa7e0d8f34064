"""Plots of a run; no other file of the package imports the plotting library.

Lines are labeled at their end rather than in a box. Their colors can be told apart with any kind of
color vision (Okabe and Ito's set, without its yellow, which is too pale for lines on white); once
the colors are used up, the dashes change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.report.tables import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
Dash = str | tuple[float, tuple[float, ...]]
_DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_GRAY = "#666666"
_FONT_POINTS = 10
_PANELS_A_ROW = 3


def draw_weight_by_domain(
    path: Path, series: Mapping[str, Series], stage_starts: Sequence[int], title: str
) -> None:
    """Write a PNG of the mean weight of each domain over steps, with a line at 1 (uniform)."""
    figure = _figure(9.0, 5.0)
    axes = figure.subplots()
    _clean(axes, title, "optimizer step", "mean weight of a sample (1 = uniform)")
    axes.axhline(1.0, color=_GRAY, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
    for step in stage_starts:
        axes.axvline(step, color="#dddddd", linewidth=1.0, zorder=0)
    drawn = {name: line for name, line in series.items() if len(line.step)}
    for number, (name, line) in enumerate(drawn.items()):
        _line(axes, line, number, name, _dash(number))
    _label_lines(figure, axes, {name: line.value[-1] for name, line in drawn.items()})
    _save(figure, path)


def draw_losses(
    path: Path,
    training: Mapping[str, Series],
    held_out: Mapping[str, Mapping[str, Series]],
    target_domain: str | None,
) -> None:
    """Write a PNG of the training loss and the held-out loss of every domain, a line a run.

    Args:
        path: file to write.
        training: training loss by run.
        held_out: held-out loss by run and domain.
        target_domain: domain to show first and to mark, if any.
    """
    domains = sorted({name for by_domain in held_out.values() for name in by_domain})
    domains.sort(key=lambda name: name != target_domain)
    panels = [("training", dict(training))]
    for domain in domains:
        mark = ", the target" if domain == target_domain != "target" else ""
        lines = {
            run: by_domain[domain] for run, by_domain in held_out.items() if domain in by_domain
        }
        panels.append((f"held out: {domain}{mark}", lines))
    columns = min(_PANELS_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.2 * columns + 0.6, 3.1 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(panels))
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        _clean(axes, title, "optimizer step", "loss (nats a token)")
        for run, line in lines.items():
            number = list(training).index(run)
            # Dashes differ too, because equal lines would hide each other.
            _line(axes, line, number, run, _DASHES[number % len(_DASHES)])
        _write_last_values(axes, [lines.get(run) for run in training])
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper center", ncols=min(4, len(names)), frameon=False
    )
    _save(figure, path)


def _figure(width_inches: float, height_inches: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "plots need matplotlib: install the extra with `pip install -e '.[report]'`"
        ) from error
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _clean(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(_as_written(title), fontsize=_FONT_POINTS + 1, loc="left")
    axes.set_xlabel(x, fontsize=_FONT_POINTS)
    axes.set_ylabel(y, fontsize=_FONT_POINTS)
    axes.tick_params(labelsize=_FONT_POINTS - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)


def _line(axes: Axes, series: Series, number: int, label: str, dash: Dash) -> None:
    axes.plot(
        series.step,
        series.value,
        color=_color(number),
        linestyle=dash,
        linewidth=1.8,
        marker="o" if len(series.step) == 1 else None,
        label=_as_written(label),
    )


def _as_written(text: str) -> str:
    """Returns text that may come from data, whose dollar signs start no formula."""
    return printable(text).replace("$", r"\$")


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _dash(number: int) -> Dash:
    return _DASHES[number // len(_COLORS) % len(_DASHES)]


def _write_last_values(axes: Axes, lines: Sequence[Series | None]) -> None:
    """Write the last value of each line, in its color, in the corner above a falling loss."""
    for number, line in enumerate(lines):
        if line is not None and len(line.step):
            axes.annotate(
                f"{line.value[-1]:.3f}",
                xy=(1.0, 1.0),
                xycoords="axes fraction",
                xytext=(-4, -4 - 1.4 * _FONT_POINTS * (number + 0.5)),
                textcoords="offset points",
                color=_color(number),
                fontsize=_FONT_POINTS,
                ha="right",
                va="center",
            )


def _label_lines(figure: Figure, axes: Axes, ends: Mapping[str, float]) -> None:
    """Write each line's name and last value beside the axes, without overlaps."""
    axes.margins(x=0)
    low, high = axes.get_ylim()
    height_points = figure.get_size_inches()[1] * 72 * 0.8
    gap = 1.35 * _FONT_POINTS / height_points
    names = sorted(ends, key=lambda name: ends[name])
    heights = spread(np.array([(ends[name] - low) / (high - low) for name in names]), gap)
    for name, height in zip(names, heights, strict=True):
        number = list(ends).index(name)
        axes.annotate(
            _as_written(f"{name}  {ends[name]:.2f}"),
            xy=(1.0, (ends[name] - low) / (high - low)),
            xycoords="axes fraction",
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=_color(number),
            fontsize=_FONT_POINTS,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _color(number),
                "linestyle": _dash(number),
                "linewidth": 1.0,
                "relpos": (0.0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Returns sorted `heights`, moved as little as possible, so that neighbors are `gap` apart.

    Groups that touch are merged and centered on the mean of their members' original heights.
    """
    groups: list[list[float]] = []  # [sum of its first height by each member, members]
    for index, height in enumerate(heights):
        groups.append([height - index * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    first = [total / members for total, members in groups for _ in range(int(members))]
    return np.array(first) + gap * np.arange(len(heights))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")
