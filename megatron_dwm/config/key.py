"""What the schema says of a key beside its type, default and help text: its rule.

A rule has the key's bound, and when the key has an effect: in which part of a method it works, and
with which values of other keys. `bounds.py` has the bounds, `effect.py` judges the effects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_dwm.config.bounds import Bound

Part = str
"""what a method may consist of, a key of `PARTS`; each method says which parts it has"""

PARTS: dict[Part, str] = {
    "target": "reads no target",
    "updates": "makes no weighting updates",
    "weighting_model": "has no weighting model",
    "groups": "weighs every sample the same",
    "alignments": "uses no alignments",
    "domain_mean": "keeps no means of domains",
    "losses": "does not weigh by losses",
    "mixing": "mixes no target passages into the batches",
}
"""every part, with what is said of a method that lacks it"""

SET: Literal["set"] = "set"
"""in place of another key's values: all but an empty one, 0 and false"""

Values = tuple[Any, ...] | Literal["set"]
Condition = Mapping[str, Values]
"""other keys, each with the values that it may have"""

_METADATA = "rule"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """bound: of a number.  part: of a method, without which the key has no effect.

    only: alternatives, one of which has to hold for the key to have an effect; empty for always.
    """

    bound: Bound | None = None
    part: Part | None = None
    only: tuple[Condition, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a configuration. name: dotted, as users type it."""

    name: str
    value: Any
    default: Any
    rule: Rule


def key(
    default: T,
    bound: Bound | None = None,
    *,
    part: Part | None = None,
    only: Condition | tuple[Condition, ...] = (),
) -> T:
    """A field of the schema with its rule; see `Rule`. A list is copied for every configuration."""
    alternatives = only if isinstance(only, tuple) else (only,)
    metadata = {_METADATA: Rule(bound=bound, part=part, only=alternatives)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore
    return field(default=default, metadata=metadata)


def entries(config: Any) -> Iterator[Entry]:
    """Every key of a `Config`, in the order of the schema."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for of_key in dataclasses.fields(values):
            factory = of_key.default_factory
            default = of_key.default if factory is dataclasses.MISSING else factory()
            yield Entry(
                name=f"{section.name}.{of_key.name}",
                value=getattr(values, of_key.name),
                default=default,
                rule=of_key.metadata.get(_METADATA, Rule()),
            )


def number_problems(config: Any) -> Iterator[str]:
    """A line for every number of a `Config` that is out of its bound; an empty value is in it."""
    for entry in entries(config):
        bound, value = entry.rule.bound, entry.value
        if bound is not None and value is not None and not bound.allows(value):
            yield f"{entry.name}: expected a number {bound}, got {value}"
