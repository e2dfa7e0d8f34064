"""Clips long names (of domains, runs, scores) in figures, where they would widen every plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_dwm.report.content import Content, Figure

MAX_CHARACTERS = 40


def with_short_names(content: Content) -> Content:
    """Returns the section with clipped names in its figures, in data and plots alike."""
    return replace(content, figures=[_shortened(figure) for figure in content.figures])


def _shortened(figure: Figure) -> Figure:
    texts = [value for values in figure.data.values() for value in values if isinstance(value, str)]
    short = short_names(dict.fromkeys((*figure.names, *figure.panel_names, *texts)))
    if not short:
        return figure
    return replace(
        figure,
        data=_renamed(figure.data, short),
        chart=_renamed(figure.chart, short),
        names=_renamed(figure.names, short),
        panel_names=_renamed(figure.panel_names, short),
    )


def short_names(names: Mapping[str, Any]) -> dict[str, str]:
    """Returns for each name that is too long a clipped one; all names stay different."""
    found: dict[str, str] = {}
    taken = set(names)
    for name in (name for name in names if len(name) > MAX_CHARACTERS):
        short, number = f"{name[: MAX_CHARACTERS - 1]}…", 1
        while short in taken:
            number += 1
            end = f"… ({number})"
            short = name[: MAX_CHARACTERS - len(end)] + end
        found[name] = short
        taken.add(short)
    return found


def _renamed(part: Any, short: Mapping[str, str]) -> Any:
    if isinstance(part, Mapping):
        return {key: _renamed(value, short) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_renamed(value, short) for value in part]
    return short.get(part, part) if isinstance(part, str) else part
