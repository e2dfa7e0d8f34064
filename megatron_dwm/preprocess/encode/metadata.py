"""Kinds of metadata values, and their spellings in a column of strings.

A column is int64 or double if all its values are such numbers, else string; what is neither string
nor null is then spelled as JSON. No value is rounded: a double holds whole numbers up to 2^53, so a
column with larger ones ("long") and with fractions ("float") is one of strings ("mixed"). The last
row can still change the kind, so values are spelled as strings first and cast at the end; the kind
depends neither on the order of the values nor on the workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import pyarrow as pa

Kind = Literal["none", "int", "long", "float", "mixed", "string"]

LARGEST_IN_DOUBLE = 1 << 53
"""every whole number up to here, of either sign, is a double"""
_INT64_LIMIT = 1 << 63
# The kinds that each kind can hold; the narrowest kind that holds both is looked up here.
_HELD: dict[Kind, set[Kind]] = {
    "none": {"none"},
    "int": {"none", "int"},
    "long": {"none", "int", "long"},
    "float": {"none", "int", "float"},
    "mixed": {"none", "int", "long", "float", "mixed"},
    "string": {"none", "int", "long", "float", "mixed", "string"},
}


def spell_column(values: Sequence[object]) -> tuple[Kind, pa.Array]:
    """The kind of the values and the column of their spellings."""
    spelled = [_spell(value) for value in values]
    none: Kind = "none"
    kind = reduce(join_kinds, {kind for kind, _ in spelled}, none)
    return kind, pa.array([spelling for _, spelling in spelled], pa.string())


def join_kinds(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds the values of both kinds."""
    return next(kind for kind, held in _HELD.items() if {first, second} <= held)


def arrow_type(kind: Kind) -> pa.DataType:
    """Type of a column of this kind; a column of nulls is one of strings."""
    types = {"int": pa.int64(), "long": pa.int64(), "float": pa.float64()}
    return types.get(kind, pa.string())


def spell_float(value: float) -> str:
    """The shortest spelling that is read as this double; a whole number has no fraction.

    So a column of doubles, which does not tell 1 from 1.0, is spelled as its values were.
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
    if isinstance(value, np.ndarray):
        value = value.tolist()
    # What only tables have, such as dates, is spelled as Python spells it.
    is_json = isinstance(value, (bool, list, dict))
    return "string", json.dumps(value, default=str) if is_json else str(value)


def _kind_of_int(value: int) -> Kind:
    if abs(value) <= LARGEST_IN_DOUBLE:
        return "int"
    return "long" if -_INT64_LIMIT <= value < _INT64_LIMIT else "string"
