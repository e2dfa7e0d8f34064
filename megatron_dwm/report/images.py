"""PNG files of figures, and the JavaScript that draws them on the page; no browser, no network.

The only file that imports vl-convert, which has Vega and its fonts inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_dwm.config.printing import printable
from megatron_dwm.report.charts import HEIGHT, Chart, panel, paper_theme
from megatron_dwm.report.content import Cell, Figure

_WIDTH = 620
_PANEL_WIDTH, _PANEL_HEIGHT = 250, 170
_PANELS_A_ROW = 3
_PIXELS_A_POINT = 2.0


def png(figure: Figure) -> bytes:
    """Returns a figure as it appears in a paper: on white, with its title and a legend."""
    import vl_convert

    spec = {**paper_chart(figure), "config": paper_theme(), "datasets": datasets(figure)}
    return vl_convert.vegalite_to_png(spec, scale=_PIXELS_A_POINT, allowed_base_urls=[])


def paper_chart(figure: Figure) -> Chart:
    """Returns a figure's Vega-Lite description with all its panels, without data and theme."""
    title = printable(figure.title)
    if figure.panels is None:
        height = figure.chart.get("height", HEIGHT)
        return {**panel(figure.chart, _WIDTH, height), "title": title}
    header = {"title": None, "labelAnchor": "start", "labelFontSize": 12}
    return {
        "$schema": figure.chart["$schema"],
        "title": title,
        "data": {"name": "table"},
        "facet": {
            "field": figure.panels,
            "type": "nominal",
            "sort": list(figure.panel_names),
            "header": header,
        },
        "columns": _PANELS_A_ROW,
        "spec": panel(_without_schema(figure.chart), _PANEL_WIDTH, _PANEL_HEIGHT),
        "resolve": {"scale": {"y": "independent"}, "axis": {"x": "independent"}},
    }


def _without_schema(chart: Mapping[str, Any]) -> Chart:
    """Returns what may stand inside a facet: plots of the data that the facet divides."""
    layers = [
        {key: value for key, value in layer.items() if value != {"data": {"name": "table"}}}
        for layer in chart.get("layer", [])
    ]
    for layer in layers:
        if layer.get("data") == {"name": "table"}:
            del layer["data"]
    inside = {key: value for key, value in chart.items() if key not in ("$schema", "data", "layer")}
    return {**inside, **({"layer": layers} if layers else {})}


def datasets(figure: Figure) -> dict[str, list[dict[str, Cell]]]:
    """Returns a figure's data as Vega reads them: a record for each row."""
    return {"table": _records(figure.data), "marks": _records(figure.marks), "one": [{}]}


def _records(data: Mapping[str, Any]) -> list[dict[str, Cell]]:
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


@cache
def vega_script() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, which defines `window.vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
