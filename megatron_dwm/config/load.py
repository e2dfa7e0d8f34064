"""Reading a configuration: a YAML file, then dotted overrides, into frozen dataclasses.

jsonargparse checks types. This file adds: one line for a user's mistake, the nearest known key for
an unknown one, which keys were set where, the bounds of numbers, `--data.train` with several
values, as Megatron's --data-path has them, `--policy.domain_weights web=2 code=0.5`,
`--data.schedule 0=0.9,0.1 800=0.5,0.5`, and the name of a method. Options of a method of the user's
own, `--policy.options.NAME VALUE`, are free here; the method checks them (options.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_dwm.config.defaults import with_defaults, with_earlier_defaults
from megatron_dwm.config.effect import Given, condition_text
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.key import entries, number_problems
from megatron_dwm.config.megatron_flags import megatron_flag
from megatron_dwm.config.methods import METHODS, methods_help, name_problems
from megatron_dwm.config.names import known_keys, known_sections, nearest_section, unknown_key
from megatron_dwm.config.options import options_help
from megatron_dwm.config.parser_messages import one_line
from megatron_dwm.config.paths import TYPED_PATHS, with_home
from megatron_dwm.config.plugins import import_plugin
from megatron_dwm.config.schema import Config
from megatron_dwm.files.atomic import write_text
from megatron_dwm.files.command_names import name_of_command

_LIST_KEYS = ("--data.train", "--run.allow_changed")
_SCHEDULE = "data.schedule"
_SETS = "evaluation.sets"
_DICT_KEYS = ("--policy.domain_weights", f"--{_SCHEDULE}", f"--{_SETS}")
_NUMBER = "NAME=NUMBER for different names"
_EXPECTED = {
    _SCHEDULE: "STEP=SHARE,SHARE for different steps",
    _SETS: "NAME=FILE for different names",
}
_OPTIONS = "policy.options"


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where its keys were set."""

    config: Config
    given: Given


def load_config(arguments: Sequence[str], prog: str = "megatron_dwm.pretrain") -> Config:
    """Read the configuration in `[CONFIG.yaml] [--section.key value ...]`; later values win.

    Raises UserError with the file or key. `--help` prints the keys and exits with 0.

    >>> config = load_config(["--training.steps", "200", "--policy.name", "uniform"])
    >>> config.training.steps, config.training.global_batch_size
    (200, 32)
    """
    return load(arguments, prog).config


def load(arguments: Sequence[str], prog: str = "megatron_dwm.pretrain") -> Loaded:
    """Read as `load_config`, and also return where each key was set."""
    rest = list(arguments)
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    if file is not None:
        rest = ["--config", str(file), *rest]
    parser, words = _parser(prog), _join_lists(rest)
    file = file or _only_configuration(words)
    given = _given(words)
    for number, word in enumerate(words):
        if word == "--config" and number + 1 < len(words):
            words[number + 1] = _as_configuration(Path(words[number + 1]))
        elif word.startswith("--config="):
            words[number] = f"--config={_as_configuration(Path(word.partition('=')[2]))}"
    try:
        parsed = parser.parse_args(words)
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(one_line(str(error), file)) from error
    config = Config(**{section: getattr(values, section) for section in known_sections()})
    for problem in chain(name_problems(config.policy.name), number_problems(config)):
        raise UserError(problem)
    config = with_home(config)
    if file is not None and file.resolve() == Path(config.run.dir, "config.yaml").resolve():
        config = with_earlier_defaults(config, given.file | given.command_line)
    return Loaded(with_defaults(config), given)


def _only_configuration(words: Sequence[str]) -> Path | None:
    """Returns the file of `--config FILE`; None unless there is one."""
    named = [Path(after) for word, after in pairwise(words) if word == "--config"]
    named += [Path(word.partition("=")[2]) for word in words if word.startswith("--config=")]
    return named[0] if len(named) == 1 else None


def config_text(config: Config, typed_paths: Mapping[str, Any] | None = None) -> str:
    """Returns the resolved configuration as YAML, which `load_config` can read.

    typed_paths: what `read_typed_paths` returned.
    """
    # The version in C is ten times faster, but not every build of PyYAML has it.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    content = dataclasses.asdict(config)
    if typed_paths:
        content[TYPED_PATHS] = dict(typed_paths)
    return yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path, typed_paths: Mapping[str, Any] | None = None) -> None:
    """Write `config_text` to `path`, all of it or nothing. Raises OSError."""
    write_text(path, config_text(config, typed_paths))


def read_typed_paths(path: Path) -> dict[str, Any]:
    """Returns the paths of a run's config.yaml as typed, if they were not absolute (paths.py)."""
    typed = _read_yaml(path).get(TYPED_PATHS)
    return typed if isinstance(typed, dict) else {}


def _as_configuration(file: Path) -> str:
    """Returns what jsonargparse should read: the file's name, or text.

    The config.yaml of a run also has the section `typed_paths`, which is no configuration. For such
    a file it is the content without that section.
    """
    content = _read_yaml(file)
    return str(file) if content.pop(TYPED_PATHS, None) is None else json.dumps(content)


def _parser(prog: str, about: str = "") -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [CONFIG.yaml] [--section.key value ...]",
        description=f"{about}Keys of a run. A YAML file gives them by section; dotted options "
        "override it. A key that has no effect with the chosen policy or mode is refused on the "
        "command line; in a file, which several methods may share, it is a warning.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help=f"the same as a leading {'CONFIG.yaml'}")
    for section, kind in typing.get_type_hints(Config).items():
        parser.add_class_arguments(kind, section)
    _add_rules(parser)
    return parser


def _add_rules(parser: ArgumentParser) -> None:
    """Add to each key's help its bound, and what the key needs to have an effect."""
    rules = {entry.name: entry.rule for entry in entries(Config())}
    for action in parser._actions:
        if (rule := rules.get(action.dest)) is None:
            continue
        bound = [str(rule.bound)] if rule.bound else []
        needs = [f"needs {condition_text(rule.only)}"] if rule.only else []
        if bound or needs:
            action.help = f"{action.help} [{'; '.join(bound + needs)}]"
        if action.dest == "policy.name":
            action.help = f"{action.help}: {methods_help()}"
        if action.dest == "policy.reference_losses":
            writer = f"{name_of_command('score')} --token-losses NAME"
            action.help = f"{action.help}; {writer} writes them"


def _given(words: Sequence[str]) -> Given:
    """Returns where each key is set; a later setting counts. Checks the keys of files."""
    set_in: dict[str, str] = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        option = option.removesuffix("+")  # `--key+` appends to a list
        if option == "--config":
            file = Path(value if equals else following)
            set_in |= dict.fromkeys(_keys_of_file(file), "file")
        elif option.startswith("--") and _key_of(option[2:]) in known_keys():
            set_in[_key_of(option[2:])] = "command line"
    return Given(
        command_line=frozenset(key for key, by in set_in.items() if by == "command line"),
        file=frozenset(key for key, by in set_in.items() if by == "file"),
    )


def _key_of(option: str) -> str:
    """Returns the key that an option sets: `policy.options` for each entry of it."""
    return _OPTIONS if re.fullmatch(rf"{_OPTIONS}\.\w+", option) else option


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


def _keys_of_file(file: Path) -> Iterator[str]:
    """Yields the keys that a file sets. Raises UserError for one that does not exist."""
    for section, values in _read_yaml(file).items():
        if section == TYPED_PATHS:
            continue
        if section not in known_sections():
            nearest = nearest_section(str(section))
            raise UserError(
                f"{file}: unknown key '{section}'; the nearest known key is '{nearest}'"
            )
        if not isinstance(values, dict):
            raise UserError(f"{file}: section '{section}' must hold keys, got {values!r}")
        for key in values:
            dotted = f"{section}.{key}"
            if dotted not in known_keys():
                raise UserError(f"{file}: {unknown_key(dotted)}")
            if dotted == _SCHEDULE:
                _check_steps(file, values[key])
            yield dotted


def _check_steps(file: Path, points: object) -> None:
    """Refuse steps that are no whole numbers; jsonargparse would round them."""
    for step in points if isinstance(points, dict) else ():
        if type(step) is not int:
            raise UserError(f"{file}: {_SCHEDULE}: expected whole numbers of steps, got {step!r}")


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """Turn `--data.train 0.3 a 0.7 b` into one JSON list, and `NAME=VALUE ...` into an object.

    Also checks the names of options.
    """
    joined: list[str] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        _check_option(word)
        joined.append(word)
        if word in _LIST_KEYS + _DICT_KEYS:
            values = []
            while position < len(arguments) and not arguments[position].startswith("--"):
                values.append(arguments[position])
                position += 1
            joined.append(values[0] if _is_json(values) else _as_json(word, values))
    return joined


def _is_json(values: Sequence[str]) -> bool:
    return len(values) == 1 and values[0].startswith(("[", "{"))


def _as_json(option: str, values: Sequence[str]) -> str:
    if option in _LIST_KEYS:
        return json.dumps(values)
    key, found = option[2:], {}
    for value in values:
        name, equals, text = value.partition("=") if key == _SETS else value.rpartition("=")
        try:
            entry = _entry(key, text)
        except ValueError:
            equals = ""
        if not (name and equals) or name in found:
            raise UserError(f"{key}: expected {_EXPECTED.get(key, _NUMBER)}, got '{value}'")
        found[name] = entry
    return json.dumps(found)


def _entry(key: str, text: str) -> Any:
    """Returns the right side of NAME=VALUE. Raises ValueError."""
    if key == _SETS:
        if not text:
            raise ValueError("no file")
        return text
    if key == _SCHEDULE:
        return [float(number) for number in text.split(",")]
    return float(text)


def _check_option(word: str) -> None:
    match = re.match(r"--([\w.]+)", word)
    if match and match[1].startswith(f"{_SETS}."):
        raise UserError(f"{match[1]}: expected --{_SETS} NAME=FILE ...")
    if not match or match[1] in ("config", "help", "print_config"):
        return
    if match[1].startswith(f"{_OPTIONS}.") and _key_of(match[1]) != _OPTIONS:
        raise UserError(f"{match[1]}: expected {_OPTIONS}.NAME with a name without dots")
    if _key_of(match[1]) not in known_keys():
        name = re.split(r"[= ]", word[2:])[0]
        flag = megatron_flag(name)
        if flag is not None:
            raise UserError(flag)
        if "." not in name and "-" in name:  # keys have a dot and no dash
            raise UserError(f"{unknown_key(name)} (flags of Megatron-LM: docs/megatron.md)")
        raise UserError(f"{unknown_key(match[1])} (see --help)")


def exit_on_help(prog: str, arguments: Sequence[str], about: str = "") -> None:
    """Print the keys and exit with 0 if `arguments` ask for help, before heavy imports.

    about: what the command does, printed before them.
    If they also name a method of the user's own, its options follow; it is imported for that.
    """
    if "--help" not in arguments and "-h" not in arguments:
        return
    _parser(prog, about).print_help()
    others = [word for word in arguments if word not in ("--help", "-h")]
    name = "uniform"
    with contextlib.suppress(UserError):  # whoever asks for help may have mistyped the rest
        name = load(others, prog).config.policy.name
    if name not in METHODS:
        print(f"\n{options_help(getattr(import_plugin(name), 'options', None), name)}", end="")
    sys.exit(0)
