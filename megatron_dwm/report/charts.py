"""How figures look, as Vega-Lite descriptions without data; the only file that imports Altair.

One description gives the interactive plot of the page, its PNG by a click, and the PNG for papers.
Colors are Okabe and Ito's, which can be told apart with any kind of color vision; they belong to
the theme, so the page can be dark. When they are used up, the dashes of lines change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from megatron_dwm.report.content import Column

Chart = dict[str, Any]
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#1a1a1a")
_DARK = ("#4FA8DC", "#F08A4B", "#2CC59A", "#E09CC4", "#9AD5F7", "#F3C14F", "#E8E8E8")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
HEIGHT = 260
# Low, uniform (1), high: blue, pale, orange.
_DIVERGING = {"light": ["#6FB1DE", "#f4f4f1", "#F2A071"], "dark": ["#1F6090", "#262b33", "#A3531F"]}
STEP = Column(name="step", title="optimizer step")


def themes() -> dict[str, Chart]:
    """Returns the configuration of plots on the light and on the dark page."""
    return {
        "light": _theme("light", _LIGHT, text="#3c4250", grid="#e6e8ec", rule="#8a909c"),
        "dark": _theme("dark", _DARK, text="#c3c8d2", grid="#30353f", rule="#858c99"),
    }


def _theme(name: str, colors: Sequence[str], *, text: str, grid: str, rule: str) -> Chart:
    plain = {"labelColor": text, "titleColor": text, "titleFontWeight": 500}
    return {
        "background": None,
        "font": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {
            **plain,
            "gridColor": grid,
            "domainColor": rule,
            "tickColor": rule,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "tickCount": 5,
            "labelOverlap": True,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": {**plain, "title": None, "labelFontSize": 11, "labelLimit": 220},
        "header": {"labelColor": text, "titleColor": text, "labelFontWeight": 600},
        "title": {
            "color": text,
            "anchor": "start",
            "fontSize": 14,
            "fontWeight": 600,
            "offset": 14,
        },
        "range": {"category": list(colors), "diverging": _DIVERGING[name]},
        "line": {"strokeWidth": 2, "strokeJoin": "round"},
        "rule": {"color": rule},
        "text": {"color": text},
        "mark": {"color": colors[0]},
    }


def paper_theme() -> Chart:
    """Returns the configuration of PNG files: the light theme on white."""
    return {**themes()["light"], "background": "white", "padding": 12}


def lines(
    y: Column,
    *,
    x: Column = STEP,
    color: str | None = None,
    names: Sequence[str] = (),
    band: bool = False,
    reference: float | None = None,
    marks: bool = False,
    dotted: Sequence[Mapping[str, str]] = (),
    points: bool = False,
    zero: bool = False,
) -> Chart:
    """Returns lines of `y` over `x`.

    Args:
        y: ordinate; its name, and those of `x` and `color`, are columns of the figure's data.
        x: abscissa.
        color: column with a line for each value; None draws one line.
        names: values of `color`, in the order of their colors.
        band: also shade between the columns `low` and `high`.
        reference: value of a dashed horizontal line.
        marks: draw a vertical line at each row of the figure's marks.
        dotted: lines, each by the values of some columns, whose points are shown (else only the one
            under the pointer): those of so few points that a line would not be seen.
        points: show the points of all lines.
        zero: begin the ordinate at 0.
    """
    across = alt.X(f"{x.name}:Q", title=x.label, axis=_ticks(x), scale=alt.Scale(nice=False))
    up = alt.Y(
        f"{y.name}:Q", title=y.label, scale=alt.Scale(zero=zero, nice=True), axis=_plain_ticks()
    )
    colored = _color(color, names)
    base = alt.Chart(alt.NamedData("table")).encode(across, **colored)
    layers = _guides(across, reference, marks)
    if band:
        edges = {"y": alt.Y("low:Q", title=y.label, axis=_plain_ticks()), "y2": "high:Q"}
        layers.append(base.mark_area(opacity=0.2).encode(**edges))
    dashed = _dash(color, names)
    layers.append(base.mark_line().encode(up, **dashed))
    hover = alt.selection_point(name="near", on="pointerover", nearest=True, clear="pointerout")
    conditions: list[dict[str, Any]] = [{"param": "near", "empty": False, "value": 1}]
    for line in dotted:
        this = {"and": [{"field": name, "equal": value} for name, value in line.items()]}
        conditions.append({"test": this, "value": 1})
    opacity = alt.OpacityValue(int(points), condition=conditions)
    tips = _tips(x, y, color)
    layers.append(
        base.mark_point(filled=True, size=45)
        .encode(up, opacity=opacity, tooltip=tips)
        .add_params(hover)
    )
    return _plain(alt.layer(*layers))


def fan(x: Column, y: Column, bands: Sequence[tuple[str, str]], middle: str, **lines: Any) -> Chart:
    """Returns nested bands (from outer to inner) round a line: a distribution over steps.

    Args:
        x: abscissa.
        y: what the columns measure.
        bands: names of the columns with the lower and the upper edge of each band.
        middle: column of the line.
        lines: `reference` and `marks`, as in `lines`.
    """
    across = alt.X(f"{x.name}:Q", title=x.label, axis=_ticks(x), scale=alt.Scale(nice=False))
    base = alt.Chart(alt.NamedData("table")).encode(across)
    layers = _guides(across, lines.get("reference"), bool(lines.get("marks")))
    scale = alt.Scale(zero=False)
    for low, high in bands:
        edges = {"y": alt.Y(f"{low}:Q", title=y.label, scale=scale), "y2": f"{high}:Q"}
        layers.append(base.mark_area(opacity=0.22).encode(**edges))
    tips = [_tip(x.name, x.label), _tip(middle, "median")]
    tips += [_tip(name, name.replace("_", " ")) for pair in bands for name in pair]
    line = base.mark_line(point={"opacity": 0, "size": 60}).encode(
        alt.Y(f"{middle}:Q", title=y.label, scale=scale), tooltip=tips
    )
    return _plain(alt.layer(*layers, line))


def areas(x: Column, y: Column, color: str, names: Sequence[str]) -> Chart:
    """Returns stacked areas of `y` over `x`, one for each value of `color`."""
    across = alt.X(f"{x.name}:Q", title=x.label, axis=_ticks(x), scale=alt.Scale(nice=False))
    chart = alt.Chart(alt.NamedData("table")).mark_area(opacity=0.85)
    up = alt.Y(f"{y.name}:Q", title=y.label, stack=True, axis=_ticks(y))
    tips = _tips(x, y, color)
    filled = _color(color, names, legend=alt.Legend(title=None))
    return _plain(chart.encode(across, up, tooltip=tips, **filled))


def histogram(x: Column, y: Column, color: str, names: Sequence[str]) -> Chart:
    """Returns counts `y` in equal bins of `x`, stacked, one area for each value of `color`."""
    across = alt.X(f"{x.name}:Q", title=x.label, scale=alt.Scale(nice=False))
    up = alt.Y(f"{y.name}:Q", title=y.label, stack=True, axis=_ticks(y))
    legend = alt.Legend(title=None, symbolType="square")
    filled = alt.Color(f"{color}:N", scale=alt.Scale(domain=list(names)), legend=legend)
    chart = alt.Chart(alt.NamedData("table")).mark_area(interpolate="step", opacity=0.85)
    return _plain(chart.encode(across, up, filled, tooltip=_tips(x, y, color)))


def bars(
    y: Column,
    category: Column,
    *,
    color: str | None = None,
    names: Sequence[str] = (),
    reference: float | None = None,
) -> Chart:
    """Returns horizontal points with error bars (columns `low` and `high`) for each category.

    Arguments are those of `lines`; the line at `reference` is vertical.
    """
    side = alt.Y(f"{category.name}:N", title=None, sort=None, axis=alt.Axis(grid=True))
    colored = _color(color, names, legend=alt.Legend(title=None))
    base = alt.Chart(alt.NamedData("table")).encode(side, **colored)
    if color is not None:
        base = base.encode(alt.YOffset(f"{color}:N", sort=list(names)))
    scale = alt.Scale(zero=False, padding=12)
    error = base.mark_rule(strokeWidth=2).encode(
        alt.X("low:Q", title=y.label, scale=scale), alt.X2("high:Q")
    )
    tips = [_tip(category.name, category.title, "N"), *_tips(None, y, color)]
    point = base.mark_point(filled=True, size=70, opacity=1).encode(
        alt.X(f"{y.name}:Q", title=y.label, scale=scale), tooltip=tips
    )
    guides = []
    if reference is not None:
        rule = alt.Chart(alt.NamedData("one")).mark_rule(strokeDash=[4, 3])
        guides.append(rule.encode(x=alt.XDatum(reference)))
    return _plain(alt.layer(*guides, error, point))


def heat(x: Column, y: Column, value: Column, *, middle: float = 1.0) -> Chart:
    """Returns cells of `value` by `x` and `y`; colors diverge from `middle` on a log scale."""
    base = alt.Chart(alt.NamedData("table")).encode(
        alt.X(f"{x.name}:O", title=x.label, axis=alt.Axis(labelAngle=0, grid=False)),
        alt.Y(f"{y.name}:N", title=None, sort=None, axis=alt.Axis(grid=False)),
        tooltip=[_tip(x.name, x.title, "O"), _tip(y.name, y.title, "N"), _tip(value.name)],
    )
    scale = alt.Scale(type="symlog", constant=0.5, domainMid=middle, interpolate="rgb")
    color = alt.Color(
        f"{value.name}:Q", scale=scale, title=value.label, legend=alt.Legend(title=value.label)
    )
    cells = base.mark_rect(stroke=None).encode(color)
    return _plain(alt.layer(cells, base.mark_text(fontSize=11).encode(alt.Text("shown:N"))))


def _guides(across: alt.X, reference: float | None, marks: bool) -> list[Any]:
    layers: list[Any] = []
    if marks:
        rule = alt.Chart(alt.NamedData("marks")).mark_rule(opacity=0.45, strokeDash=[1, 3])
        layers.append(rule.encode(across))
    if reference is not None:
        rule = alt.Chart(alt.NamedData("one")).mark_rule(strokeDash=[4, 3])
        layers.append(rule.encode(y=alt.YDatum(reference)))
    return layers


def _ticks(column: Column) -> alt.Axis:
    across = column.name in ("step", "tokens", "flops", "time")
    text = "datum.value == 0 ? '0' : format(datum.value, '~s')"
    return alt.Axis(labelExpr=text, grid=not across)


def _plain_ticks() -> alt.Axis:
    """Returns an axis with as many digits as tell its ticks apart.

    Vega takes the digits from the distance of the ticks, and shows the only tick of a curve with
    one value as 0.
    """
    number = "abs(datum.value) < 0.001 ? format(datum.value, '.3~g') : "
    number += "abs(datum.value) >= 1e6 ? format(datum.value, '.4~s') : "
    text = f"datum.value == 0 ? '0' : {number}format(datum.value, ',.6~f')"
    return alt.Axis(labelExpr=text)


def _color(
    color: str | None, names: Sequence[str], legend: alt.Legend | None = None
) -> dict[str, Any]:
    if color is None:
        return {}
    scale = alt.Scale(domain=list(names))
    return {"color": alt.Color(f"{color}:N", scale=scale, legend=legend or _legend_of_lines())}


def _dash(color: str | None, names: Sequence[str]) -> dict[str, Any]:
    """The first seven lines are solid, as many colors as there are; the next seven are dashed."""
    if color is None or len(names) <= len(_LIGHT):
        return {}
    dashes = [_DASHES[number // len(_LIGHT) % len(_DASHES)] for number in range(len(names))]
    scale = alt.Scale(domain=list(names), range=dashes)
    return {"strokeDash": alt.StrokeDash(f"{color}:N", scale=scale, legend=_legend_of_lines())}


def _legend_of_lines() -> alt.Legend:
    return alt.Legend(
        title=None, symbolType="stroke", symbolStrokeWidth=3, symbolSize=260, symbolOpacity=1
    )


def swatches(count: int) -> list[dict[str, Any]]:
    """Returns the number of the color and the dash of each of `count` names, for a legend."""
    many = len(_LIGHT)
    return [
        {"color": number % many, "dash": _DASHES[number // many % len(_DASHES)]}
        for number in range(count)
    ]


def _tips(x: Column | None, y: Column, color: str | None) -> list[alt.Tooltip]:
    tips = [_tip(color, color, "N")] if color is not None else []
    return tips + ([_tip(x.name, x.label)] if x is not None else []) + [_tip(y.name, y.label)]


def _tip(name: str, title: str | None = None, kind: str = "Q") -> alt.Tooltip:
    form = ".5~g" if kind == "Q" else alt.Undefined
    return alt.Tooltip(f"{name}:{kind}", title=title or name, format=form)


def _plain(chart: Any) -> Chart:
    """Returns a chart without Altair's own look, which the themes replace.

    And without the release of Vega-Lite that Altair was made for: it would warn on the page if
    vl-convert has the one before it, although these charts need nothing so new.
    """
    spec = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("config", "$schema")}


def without_legend(chart: Any) -> Any:
    """Returns a chart whose legend is elsewhere on the page."""
    if isinstance(chart, list):
        return [without_legend(part) for part in chart]
    if not isinstance(chart, dict):
        return chart
    return {k: None if k == "legend" else without_legend(part) for k, part in chart.items()}


def panel(chart: Mapping[str, Any], width: int | str, height: int) -> Chart:
    """Returns the description of one plot of a given size (pixels; "container" fills the page)."""
    return {**chart, "width": width, "height": height}
