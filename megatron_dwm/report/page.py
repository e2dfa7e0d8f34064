"""Writes the report as one HTML file: text, data, styles and scripts in it, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from megatron_dwm.config.printing import printable
from megatron_dwm.report.charts import HEIGHT, swatches, themes, without_legend
from megatron_dwm.report.content import Cell, Content, Figure
from megatron_dwm.report.images import paper_chart, vega_script

_FOLDER = files("megatron_dwm.report") / "page"
_ABSCISSAS = ("step", "tokens", "flops", "time")
_SCRIPT_END = re.compile(r"</(?=script)", re.IGNORECASE)


def html_page(title: str, contents: Sequence[Content], *, reload_s: float | None = None) -> str:
    """Returns the whole page.

    Args:
        title: the runs' names.
        contents: the sections, in order.
        reload_s: the page reloads itself after so many seconds (while a run is watched); None: not.
    """
    environment = _environment()
    return environment.get_template("report.html.j2").render(
        title=printable(title),
        contents=contents,
        figure_data=figure_data,
        cell=cell_text,
        is_number=_is_number,
        themes=themes(),
        reload_s=reload_s,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        styles=_texts(".css"),
        vega=_inside_script(vega_script()),
        scripts=_inside_script(_texts(".js")),
    )


def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str | None:
        file = _FOLDER / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: _visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(text: str) -> str:
    """Returns text with control characters spelled; autoescape does the rest."""
    return printable(text, keep="\n\t")


def _texts(ending: str) -> str:
    names = sorted(file.name for file in _FOLDER.iterdir() if file.name.endswith(ending))
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def _inside_script(text: str) -> str:
    """Returns JavaScript that cannot end the element it stands in."""
    return _SCRIPT_END.sub(r"<\\/", text)


def figure_data(figure: Figure) -> dict[str, Any]:
    """Returns what the page's script needs of a figure."""
    return {
        "id": figure.id,
        "title": figure.title,
        "columns": [{"name": c.name, "label": c.label} for c in figure.columns],
        "data": figure.data,
        "marks": figure.marks,
        "chart": without_legend(figure.chart) if figure.series else figure.chart,
        "paper": paper_chart(figure),
        "height": figure.chart.get("height", HEIGHT),
        "series": figure.series,
        "names": list(figure.names),
        "swatches": swatches(len(figure.names)),
        "panels": figure.panels,
        "panelNames": list(figure.panel_names),
        "abscissas": _abscissas(figure),
    }


def _abscissas(figure: Figure) -> list[str]:
    """Returns the abscissas that the figure can have: those whose values were all recorded."""
    if "step" not in figure.data:
        return []
    return [name for name in _ABSCISSAS if name in figure.data and None not in figure.data[name]]


def cell_text(value: Cell) -> str:
    """Returns a cell of a table as text: numbers with four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return printable(value)
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}" if abs(value) < 1e10 else f"{value:.4g}"
    return f"{value:,.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"


def _is_number(value: Cell) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
