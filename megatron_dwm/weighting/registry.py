"""From a method's name to its class (config/methods.py has the names)."""

from __future__ import annotations

import importlib

from megatron_dwm.config import Config
from megatron_dwm.config.methods import METHODS
from megatron_dwm.weighting.method import Method


def method_class(config: Config) -> type[Method]:
    """The class that `policy.name` stands for."""
    module, name = METHODS[config.policy.name].path.split(":")
    return getattr(importlib.import_module(module), name)
