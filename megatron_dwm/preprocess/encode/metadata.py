"""Metadata values as columns: what kind they are and how a column of strings holds them.

A column is int64 or double if all its values are such numbers, else string; what is neither string
nor null is then spelled as JSON. No value is rounded: a double holds whole numbers up to 2^53, so a
column with larger ones ("long") and with fractions ("float") is one of strings ("mixed"). Only the
last row can settle that, so values are spelled as strings first and cast at the end; the kind does
not depend on the order of the values, nor on which worker saw which.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import pyarrow as pa

Kind = Literal["none", "int", "long", "float", "mixed", "string"]

LARGEST_IN_DOUBLE = 1 << 53
"""every whole number up to here, of either sign, is a double"""
_INT64_LIMIT = 1 << 63
# What a kind can hold besides itself; the narrowest kind that holds both is looked up here.
_HELD: dict[Kind, set[Kind]] = {
    "none": {"none"},
    "int": {"none", "int"},
    "long": {"none", "int", "long"},
    "float": {"none", "int", "float"},
    "mixed": {"none", "int", "long", "float", "mixed"},
    "string": {"none", "int", "long", "float", "mixed", "string"},
}


def spell_column(values: Sequence[object]) -> tuple[Kind, pa.Array]:
    """Kind of the values and the column of their spellings."""
    spelled = [_spell(value) for value in values]
    none: Kind = "none"
    kind = reduce(join_kinds, {kind for kind, _ in spelled}, none)
    return kind, pa.array([spelling for _, spelling in spelled], pa.string())


def join_kinds(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds both."""
    return next(kind for kind, held in _HELD.items() if {first, second} <= held)


def arrow_type(kind: Kind) -> pa.DataType:
    """Type of a column of this kind; a column of nulls is one of strings."""
    types = {"int": pa.int64(), "long": pa.int64(), "float": pa.float64()}
    return types.get(kind, pa.string())


def spell_float(value: float) -> str:
    """Shortest spelling that is read as this double; of a whole number without a fraction.

    So a column of doubles, in which 1 and 1.0 are one, is spelled as its values would have been.
    """
    return repr(value).removesuffix(".0")


def _spell(value: object) -> tuple[Kind, str | None]:
    if value is None:
        return "none", None
    if isinstance(value, str):
        if value.isascii():
            return "string", value
        # A surrogate without its partner has no UTF-8; Parquet strings are UTF-8.
        return "string", value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return "float", spell_float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _kind_of_int(value), str(value)
    return "string", json.dumps(value, default=str)


def _kind_of_int(value: int) -> Kind:
    if abs(value) <= LARGEST_IN_DOUBLE:
        return "int"
    return "long" if -_INT64_LIMIT <= value < _INT64_LIMIT else "string"
