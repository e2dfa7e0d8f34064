"""The options of a method outside the package: `policy.options` as the dataclass that it declares.

The names, types, defaults and help texts are those of the dataclass; jsonargparse checks them as it
checks the keys of the package. The dataclass checks bounds itself (`__post_init__`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.parser_messages import one_line

_SECTION = "policy.options"


def read_options(kind: type | None, given: Mapping[str, Any], owner: str) -> Any:
    """Returns an instance of `kind` with the `given` values, and defaults for the others.

    kind: a dataclass; None for a method without options, which returns None. owner: `policy.name`.
    Raises UserError for a name that `kind` does not have, a wrong type, a value that is missing,
    and for a ValueError of `kind` itself.
    """
    _require_known(kind, given, owner)
    if kind is None:
        return None
    parser = _parser(kind)
    try:
        parsed = parser.parse_object({"policy": {"options": dict(given)}})
        return parser.instantiate(parsed).policy.options
    except ArgumentError as error:
        raise UserError(one_line(str(error), None)) from error
    except ValueError as error:  # of the dataclass: a bound, or a rule between options
        raise UserError(f"{_SECTION}: {' '.join(str(error).split())}") from error


def resolved_options(kind: type | None, given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Returns the values of all options as a configuration file has them, defaults included.

    Raises UserError as `read_options`.
    """
    read_options(kind, given, owner)
    if kind is None:
        return {}
    parser = _parser(kind)
    parsed = parser.parse_object({"policy": {"options": dict(given)}})
    return yaml.safe_load(parser.dump(parsed, skip_none=False))["policy"]["options"]


def options_help(kind: type | None, owner: str) -> str:
    """Returns the options of a method, for `--help`."""
    if kind is None:
        return f"policy {owner} has no options\n"
    return f"Options of policy {owner}:\n{_parser(kind).format_help()}"


def _parser(kind: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False, exit_on_error=False)
    parser.add_class_arguments(kind, _SECTION)
    for action in parser._actions:
        if action.dest == _SECTION:  # a file with the options alone; the configuration has them
            action.help = argparse.SUPPRESS
    return parser


def _require_known(kind: type | None, given: Mapping[str, Any], owner: str) -> None:
    known = [] if kind is None else [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            knows = f"it knows {', '.join(known)}" if known else "it has none"
            raise UserError(f"{_SECTION}.{name}: policy {owner} has no such option; {knows}")
