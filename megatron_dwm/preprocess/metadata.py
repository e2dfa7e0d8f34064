"""Metadata values as columns: what kind they are and how a column of strings holds them.

A column is int64 or double if all its values are such numbers, else string; what is neither string
nor null is then spelled as JSON. Only the last row can settle that, so values are spelled as
strings first and cast at the end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import pyarrow as pa

Kind = Literal["none", "int", "float", "string"]

_INT64_LIMIT = 1 << 63


def spell_column(values: Sequence[object]) -> tuple[Kind, pa.Array]:
    """Kind of the values and the column of their spellings."""
    spelled = [_spell(value) for value in values]
    kind = reduce(join_kinds, {kind for kind, _ in spelled}, "none")
    return kind, pa.array([spelling for _, spelling in spelled], pa.string())


def join_kinds(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds both."""
    if first == second or second == "none":
        return first
    if first == "none":
        return second
    return "string" if "string" in (first, second) else "float"


def arrow_type(kind: Kind) -> pa.DataType:
    """Type of a column of this kind; a column of nulls is one of strings."""
    return {"int": pa.int64(), "float": pa.float64()}.get(kind, pa.string())


def _spell(value: object) -> tuple[Kind, str | None]:
    if value is None:
        return "none", None
    if isinstance(value, str):
        if value.isascii():
            return "string", value
        # A surrogate without its partner has no UTF-8; Parquet strings are UTF-8.
        return "string", value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return "float", repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return ("int" if -_INT64_LIMIT <= value < _INT64_LIMIT else "string"), str(value)
    return "string", json.dumps(value, default=str)
