"""The rule of a key: its bound, and when the key has an effect.

A key has an effect if the method has the part that reads it, and if other keys have certain values.
The schema declares the rule next to the key's type, default and help text. `bounds.py` defines the
bounds; `effect.py` finds keys without effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_dwm.config.bounds import Bound

Part = str
"""a key of `PARTS`; each method declares which parts it has"""

PARTS: dict[Part, str] = {
    "target": "reads no target",
    "passages": "reads no validation batches",
    "updates": "learns no weights",
    "hypergradients": "computes no hypergradients",
    "weighting_model": "has no weighting model",
    "groups": "weighs every sample the same",
    "softmax": "has no softmax over a group",
    "normalizer": "cannot divide its weights after the pass",
    "selection": "has no fraction of units to keep",
    "reference": "has no reference model",
    "second_llm": "has no second LLM",
    "dynamic_reference": "trains no reference model",
    "alignments": "learns nothing from alignments",
    "domain_mean": "keeps no means of domains",
    "losses": "does not weigh by losses",
    "similarity": "compares no features",
    "values": "has no weights of its own for documents",
    "pacing": "has no curriculum",
    "gradient_alignment": "does not weigh by the batch's own alignments",
    "aligned_steps": "computes no alignments of the batches that it trains on",
    "redundancy": "chooses nothing one by one",
    "sampling": "draws nothing from a pool",
    "pool": "trains on every batch that it reads",
    "mixing": "mixes no target passages into the batches",
}
"""every part, with the words for a method that lacks it"""

SET: Literal["set"] = "set"
"""stands for every value of another key except an empty one, 0 and false"""

SEVERAL: Literal["several"] = "several"
"""stands for every number above 1 of another key"""

PLUGIN: Literal["plugin"] = "plugin"
"""stands for every value of `policy.name` that is no built-in method"""

Values = tuple[Any, ...] | Literal["set", "several", "plugin"]
Condition = Mapping[str, Values]
"""other keys, each with the values of which it must have one"""

_METADATA = "rule"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a key's value is valid, and when it has an effect.

    bound: of the number. part: the part of a method that reads the key.
    only: alternatives, one of which must hold for the key to have an effect; empty for always.
    """

    bound: Bound | None = None
    part: Part | None = None
    only: tuple[Condition, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a configuration; `name` is dotted, as users type it."""

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
    """Returns a dataclass field with a `Rule`; every configuration gets its own list or dict."""
    assert part is None or part in PARTS, part
    alternatives = only if isinstance(only, tuple) else (only,)
    metadata = {_METADATA: Rule(bound=bound, part=part, only=alternatives)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def entries(config: Any) -> Iterator[Entry]:
    """Yields every key of a `Config`, in the order of the schema."""
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
    """Yields a line for every number of a `Config` outside its bound; an empty value is allowed.

    A dict has a number under each of its names.
    """
    for entry in entries(config):
        bound, value = entry.rule.bound, entry.value
        numbers = (
            {f" {name}": each for name, each in value.items()}
            if isinstance(value, dict)
            else {"": value}
        )
        for name, number in numbers.items():
            if bound is not None and number is not None and not bound.allows(number):
                yield f"{entry.name}{name}: expected a number {bound}, got {number}"
