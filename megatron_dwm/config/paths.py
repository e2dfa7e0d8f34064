"""The paths of a configuration: as they were typed, and absolute.

A run's config.yaml has absolute paths, so that it can be used from any directory. Paths that were
typed as relative ones are also kept at its end, with the directory in which they were typed. A
resumed run may type them again, in the same directory or in a tree that was moved as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import Config

TYPED_PATHS = "typed_paths"
"""a section of config.yaml that is no configuration"""

_DIRECTORY = "directory"
_TRAIN = "data.train"
_KEYS = (
    *("run.dir", "model.init_from", "data.tokenizer", "data.cache_dir", "validation.path"),
    *("evaluation.path", "evaluation.sets", "weighting.load", "policy.reference"),
)
PATH_KEYS = (*_KEYS, _TRAIN)


def with_home(config: Config) -> Config:
    """Returns `config` with `~` and `~user` at the head of a path as in a shell.

    A shell does not replace them in a YAML file or after `=`. Raises UserError for an unknown user.
    """
    for key in PATH_KEYS:
        value = _get(config, key)
        if value is not None:
            try:
                config = _set(config, key, _each(value, _expanded))
            except RuntimeError:
                raise UserError(f"{key} {value}: ~ names no known user's directory") from None
    return config


def with_absolute_paths(config: Config) -> Config:
    """Returns `config` with every path absolute; symbolic links are not resolved."""
    for key in PATH_KEYS:
        value = _get(config, key)
        if value is not None:
            config = _set(config, key, _each(value, _absolute))
    return config


def typed_paths(config: Config) -> dict[str, Any]:
    """Returns the values with relative paths, by key, and the directory; empty without any."""
    absolute = with_absolute_paths(config)
    typed = {
        key: _get(config, key) for key in PATH_KEYS if _get(config, key) != _get(absolute, key)
    }
    return {_DIRECTORY: str(Path.cwd()), **typed} if typed else {}


def is_same_path(key: str, before: Any, now: Any, typed: Mapping[str, Any]) -> bool:
    """True if a key of `PATH_KEYS` still names the same path.

    before: the value in a run's config.yaml. typed: its `typed_paths`. now: the value typed today.
    """
    if before == now or (key in typed and typed[key] == now):
        return True
    if before is None or now is None:
        return False
    return _each(before, os.path.realpath) == _each(now, os.path.realpath)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to a path, to paths by name, or to the prefixes in `data.train`."""
    if isinstance(value, dict):
        return {name: change(path) for name, path in value.items()}
    if isinstance(value, list):
        return [entry if is_weight(entry) else change(entry) for entry in value]
    return change(value)


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def is_weight(entry: str | float) -> bool:
    """True if this entry of `data.train` is a weight, not a prefix."""
    try:
        float(entry)
    except ValueError:
        return False
    return True


def _get(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _set(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
