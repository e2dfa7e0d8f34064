"""Keys that are set but have no effect with the chosen method and mode.

On the command line such a key is an error, because whoever typed it expects an effect; not if it is
empty (`null`), which takes back what a file says. In a file it is a warning, and only if its value
differs from the default: several methods may share a file, and the `config.yaml` of a run has every
key.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_dwm.config.defaults import with_defaults
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.key import (
    PARTS,
    PLUGIN,
    SET,
    SEVERAL,
    Condition,
    Entry,
    Part,
    Values,
    entries,
)
from megatron_dwm.config.methods import METHODS
from megatron_dwm.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Given:
    """The dotted keys that the user set: on the command line, or only in a file."""

    command_line: frozenset[str] = field(default_factory=frozenset)
    file: frozenset[str] = field(default_factory=frozenset)


def warnings_of_effect(config: Config, given: Given, parts: Set[Part]) -> list[str]:
    """Returns one line for each reason why keys of a file have no effect.

    parts: the parts that the method has. Raises UserError if a key of the command line has no
    effect.
    """
    if unknown := sorted(parts - PARTS.keys()):
        raise UserError(
            f"policy {config.policy.name}: parts has an unknown one, {unknown[0]!r}; there are "
            f"{', '.join(PARTS)}"
        )
    idle = {name: why for entry in entries(config) for name, why in _idle(entry, config, parts)}
    refused = [name for name in idle if _is_refused(name, _value(config, name), given)]
    if refused:
        also = f" (also without effect: {', '.join(refused[1:])})" if refused[1:] else ""
        raise UserError(f"{refused[0]}: has no effect: {idle[refused[0]]}; leave it out{also}")
    changed = {entry.name for entry in entries(config) if entry.value != _default(entry, config)}
    by_reason: dict[str, list[str]] = {}
    for name in idle:
        if name in given.file & changed:
            by_reason.setdefault(idle[name], []).append(name)
    return [_warning(names, why) for why, names in by_reason.items()]


def _is_refused(name: str, value: Any, given: Given) -> bool:
    """True if the key must have an effect: on the command line, or `policy.options` in a file.

    A file with options of one method may be used with another that the command line names.
    """
    if name != "policy.options":
        return name in given.command_line and value is not None
    chosen_elsewhere = "policy.name" in given.command_line
    return bool(value) and (name in given.command_line or not chosen_elsewhere)


def _default(entry: Entry, config: Config) -> Any:
    """Returns the key's default, or what an empty key stands for beside the other keys."""
    section, name = entry.name.split(".")
    if entry.default is not None or section != "weighting":
        return entry.default
    empty: dict[str, Any] = {name: None}
    values = replace(config.weighting, **empty)
    return getattr(with_defaults(replace(config, weighting=values)).weighting, name)


def _warning(names: list[str], why: str) -> str:
    verb = "has" if len(names) == 1 else "have"
    return f"{', '.join(names)}: set in the configuration file, {verb} no effect: {why}"


def _idle(entry: Entry, config: Config, parts: Set[Part]) -> Iterator[tuple[str, str]]:
    """Yields the key and the reason if the key has no effect, else nothing."""
    rule = entry.rule
    if rule.part is not None and rule.part not in parts:
        yield entry.name, f"{_method(config, parts)} {PARTS[rule.part]}"
    elif rule.only and all(_unmet(config, each) for each in rule.only):
        nearest = min((_unmet(config, each) for each in rule.only), key=len)
        yield entry.name, f"{_now(config, nearest[0])}, and it needs {condition_text(rule.only)}"


def _method(config: Config, parts: Set[Part]) -> str:
    """Returns the method in words, with the keys that take parts from it."""
    frozen = "weighting_model" in parts and config.weighting.frozen
    chosen = config.policy.alignment_choice if "gradient_alignment" in parts else None
    return (
        f"policy {config.policy.name}{' with weighting.frozen' if frozen else ''}"
        f"{f' with policy.alignment_choice {chosen}' if chosen else ''}"
    )


def _unmet(config: Config, condition: Condition) -> list[str]:
    """Returns the keys whose values the condition does not allow."""
    return [name for name, values in condition.items() if not _has(config, name, values)]


def _has(config: Config, name: str, values: Values) -> bool:
    value = _value(config, name)
    if values == SEVERAL:
        return value > 1
    if values == PLUGIN:
        return value not in METHODS
    return bool(value) if values == SET else value in values


def _value(config: Config, name: str) -> Any:
    if name == "weighting.update_on":
        return config.update_on
    if name == "weighting.across_samples":
        return config.weighting.attends_across_samples
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _now(config: Config, name: str) -> str:
    value = _value(config, name)
    return f"{name} is {'empty' if value is None else _word(value)}"


def condition_text(alternatives: tuple[Condition, ...]) -> str:
    """Returns the alternatives in words, for `--help` and messages."""
    return " or ".join(
        " and ".join(_wanted(name, values) for name, values in condition.items())
        for condition in alternatives
    )


def _wanted(name: str, values: Values) -> str:
    if values == SET:
        return f"{name} set"
    if values == SEVERAL:
        return f"{name} above 1"
    if values == PLUGIN:
        return f"{name} package.module:Class"
    if values == (None,):
        return f"{name} empty"
    return f"{name} {' or '.join(map(_word, values))}"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
