"""Checks the class of a method outside the package, before any process group exists."""

from __future__ import annotations

import functools
import inspect
from dataclasses import is_dataclass
from typing import Any

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.methods import METHODS
from megatron_dwm.config.plugins import import_plugin
from megatron_dwm.weighting.method import CONTRACT_VERSION, Method
from megatron_dwm.weighting.pool import ChoosesFromPool

_PACKAGE = __name__.partition(".")[0]


@functools.cache
def plugin_class(name: str) -> type[Method]:
    """Returns the class that `package.module:Class` names.

    Raises UserError if it cannot be imported, and with the rule that it breaks.
    """
    found = import_plugin(name)
    if (problem := _problem(found)) is not None:
        raise UserError(f"policy.name {name}: {problem}")
    return found


def _problem(found: Any) -> str | None:
    """Returns the rule that the class breaks, or None."""
    # Python's issubclass refuses protocols, of which Method is one.
    if Method not in getattr(found, "__mro__", ()):
        return f"expected a class that inherits from megatron_dwm.plugin.Method, got {found!r}"
    if found.__module__.partition(".")[0] == _PACKAGE:
        return _of_the_package(found)
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        return f"the class does not define {missing} (docs/plugins.md)"
    if found.contract_version != CONTRACT_VERSION:
        return _of_another_version(found.contract_version)
    if found.options is not None and not is_dataclass(found.options):
        return f"options: expected a dataclass, got {found.options!r}"
    own = [name for name in ("state_dict", "load_state_dict") if _overrides(found, name)]
    if len(own) == 1:
        return (
            f"the class defines {own[0]} alone; a resumed run needs both state_dict and "
            "load_state_dict (docs/plugins.md)"
        )
    return None


def pool_problem(config: Config, method: type[Method]) -> str | None:
    """Returns what a method lacks for the pools that it reads, or None."""
    if method.pool_batches(config) == 1 or ChoosesFromPool in method.__mro__:
        return None
    return "pool_batches is above 1, and the class does not inherit from ChoosesFromPool"


def update_problem(config: Config, method: type[Method]) -> str | None:
    """Returns what a method lacks for the updates that its schedule has, or None."""
    if not method.schedule(config).num_updates:
        return None
    parts = method.parts(config)
    if "target" not in parts:
        return "its schedule has updates, but its parts lack target, which updates read"
    if method.aligns_first:  # `weights` has the alignments
        return None
    needed = "update" if "hypergradients" in parts else "read_target"
    needed = "own_update" if method.own_updates else needed
    if not _overrides(method, needed):
        return f"its schedule has updates, and the class does not define {needed}"
    return None


def _overrides(found: type, name: str) -> bool:
    return getattr(found, name) is not getattr(Method, name)


def _of_the_package(found: type) -> str:
    path = f"{found.__module__}:{found.__qualname__}"
    names = [name for name, method in METHODS.items() if method.path == path]
    if names:
        return f"this is the built-in method {names[0]}; write policy.name {names[0]}"
    return "this is a base class of the package; inherit from it in a module of your own"


def _of_another_version(version: object) -> str:
    if version is None:
        return f"the class states no contract_version; add contract_version = {CONTRACT_VERSION}"
    return (
        f"contract_version {version!r}, and this {_PACKAGE} has {CONTRACT_VERSION}; install the "
        "release that it was written for, or change the class (docs/plugins.md)"
    )
