"""The prefixes of `data.train` and their shares.

`data.train` is a list of prefixes, or `weight prefix weight prefix ...`, as Megatron's
`--data-path`. A prefix that is named twice is one part of the blend with the sum of the shares, so
that none of its samples is read again before all were read; Megatron would read the same samples
for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlendPart:
    """One prefix of `data.train` and its share."""

    prefix: str
    weight: float | None
    """None if `data.train` has no weights; the share is then in proportion to the size"""
    places: tuple[int, ...]
    """where the list of prefixes names it, from 0; several if it does so more than once"""


def parse_blend(train: Sequence[str | float]) -> list[BlendPart]:
    """Returns the parts of `data.train`, in order, one for each prefix, however it is spelled.

    Raises:
        UserError: the list is empty, weights and prefixes do not alternate, or a weight is not a
            positive number.
    """
    entries = [str(entry) for entry in train]
    if not entries:
        raise UserError("data.train is empty: name at least one prefix of PREFIX.bin/PREFIX.idx")
    weighted = any(_number(entry) is not None for entry in entries)
    named = _weighted(entries) if weighted else [(prefix, None) for prefix in entries]
    places: dict[Path, list[int]] = {}
    for place, (prefix, _) in enumerate(named):
        places.setdefault(Path(prefix).resolve(), []).append(place)
    return [
        BlendPart(
            prefix=named[found[0]][0],
            weight=sum(named[place][1] or 0.0 for place in found) if weighted else None,
            places=tuple(found),
        )
        for found in places.values()
    ]


def _weighted(entries: list[str]) -> list[tuple[str, float | None]]:
    """Returns every prefix with its weight."""
    expected = "expected weights and prefixes in turn (0.3 A 0.7 B), or prefixes alone"
    if len(entries) % 2 == 1:
        raise UserError(
            f"data.train has {len(entries)} entries with weights among them: {expected}"
        )
    parts: list[tuple[str, float | None]] = []
    for weight_text, prefix in zip(entries[::2], entries[1::2], strict=True):
        weight = _number(weight_text)
        if weight is None or _number(prefix) is not None:
            raise UserError(f"data.train has '{weight_text} {prefix}' as a pair: {expected}")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"data.train gives {prefix} the weight {weight_text}: must be above 0")
        parts.append((prefix, weight))
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
