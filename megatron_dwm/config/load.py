"""Reading a configuration: a YAML file, then dotted overrides, into frozen dataclasses.

jsonargparse does the typing. What is ours: one line for a user's mistake, the nearest known key for
an unknown one, and `--data.train` with values in turn, as Megatron's --data-path takes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_dwm.config.bounds import number_problems
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.paths import TYPED_PATHS
from megatron_dwm.config.schema import Config

_LIST_KEYS = ("--data.train", "--run.allow_changed")


def known_keys() -> list[str]:
    """Every dotted key of a configuration, in the order of the schema."""
    return [
        f"{section}.{field.name}"
        for section, kind in typing.get_type_hints(Config).items()
        for field in dataclasses.fields(kind)
    ]


def load_config(arguments: Sequence[str], prog: str = "megatron_dwm.pretrain") -> Config:
    """The run that `[CONFIG.yaml] [--section.key value ...]` asks for; later values win.

    Raises UserError naming the file or key. `--help` prints and leaves with 0.
    """
    rest = list(arguments)
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    parser = _parser(prog)
    if file is not None:
        content = _read_yaml(file)
        # A run's own config.yaml also has what is no configuration; jsonargparse takes text, too.
        text = str(file) if content.pop(TYPED_PATHS, None) is None else json.dumps(content)
        _check_keys(content, file)
        rest = ["--config", text, *rest]
    try:
        parsed = parser.parse_args(_join_lists(rest))
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), file)) from error
    sections = {section: getattr(values, section) for section in typing.get_type_hints(Config)}
    config = Config(**sections)
    for problem in number_problems(config):
        raise UserError(problem)
    return config


def save_config(config: Config, path: Path, typed_paths: Mapping[str, Any] | None = None) -> None:
    """Write the resolved configuration, whole or not at all; `load_config([path])` gives it back.

    typed_paths: what `read_typed_paths` gives back. Raises OSError.
    """
    # In C where that is built: ten times faster, and every checkpoint has a copy.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    content = dataclasses.asdict(config)
    if typed_paths:
        content[TYPED_PATHS] = dict(typed_paths)
    text = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read_typed_paths(path: Path) -> dict[str, Any]:
    """How the paths in a run's config.yaml were typed, where they were not absolute (paths.py)."""
    typed = _read_yaml(path).get(TYPED_PATHS)
    return typed if isinstance(typed, dict) else {}


def _parser(prog: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [CONFIG.yaml] [--section.key value ...]",
        description="Keys of a run. A YAML file gives them by section; dotted options override it.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help=f"the same as a leading {'CONFIG.yaml'}")
    for section, kind in typing.get_type_hints(Config).items():
        parser.add_class_arguments(kind, section)
    return parser


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such configuration file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{file}:{line} not YAML: {problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected sections with keys, such as 'training: {{steps: 10}}'")
    return content


def _check_keys(content: dict[str, Any], file: Path) -> None:
    sections = list(typing.get_type_hints(Config))
    for section, values in content.items():
        if section not in sections:
            raise UserError(f"{file}: {_unknown(str(section), sections)}")
        if not isinstance(values, dict):
            raise UserError(f"{file}: section '{section}' must hold keys, got {values!r}")
        for key in values:
            dotted = f"{section}.{key}"
            if dotted not in known_keys():
                raise UserError(f"{file}: {_unknown(dotted, known_keys())}")


def _unknown(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key '{key}'; the nearest known key is '{nearest[0]}'"


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """`--data.train 0.3 a 0.7 b` as one JSON list; also checks the names of options."""
    joined: list[str] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        _check_option(word)
        joined.append(word)
        if word in _LIST_KEYS:
            values = []
            while position < len(arguments) and not arguments[position].startswith("--"):
                values.append(arguments[position])
                position += 1
            joined.append(values[0] if _is_json_list(values) else json.dumps(values))
    return joined


def _is_json_list(values: Sequence[str]) -> bool:
    return len(values) == 1 and values[0].startswith("[")


def _check_option(word: str) -> None:
    match = re.match(r"--([\w.]+)", word)
    if not match or match[1] in ("config", "help", "print_config"):
        return
    if match[1] not in known_keys():
        raise UserError(f"{_unknown(match[1], known_keys())} (see --help)")


def _one_line(message: str, file: Path | None) -> str:
    """jsonargparse's message on one line, its types in plain words."""
    text = re.sub(r"\s+", " ", message)
    text = re.sub(r"Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    text = text.replace("Expected a Literal", "expected one of ")
    where = f" (from {file} or the command line)" if file else ""
    return text + where


def exit_on_help(prog: str, arguments: Sequence[str]) -> None:
    """Print the keys and leave with 0 if `arguments` ask for help, before anything heavy loads."""
    if "--help" in arguments or "-h" in arguments:
        _parser(prog).print_help()
        sys.exit(0)
