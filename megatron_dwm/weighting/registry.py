"""Finds a method's class by its name; config/methods.py has the names."""

from __future__ import annotations

import importlib

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.methods import METHODS
from megatron_dwm.weighting.method import Method


def method_class(config: Config) -> type[Method]:
    """Returns the class of `policy.name`."""
    module, name = METHODS[config.policy.name].path.split(":")
    return getattr(importlib.import_module(module), name)


def learns(config: Config) -> bool:
    """True if the run's method reads hypergradients."""
    return "hypergradients" in method_class(config).parts(config)


def check_method(config: Config, num_layers: int, world_size: int) -> None:
    """Raise UserError for the first of the method's rules that the configuration breaks.

    num_layers: layers of the LLM. world_size: number of processes.
    """
    unit, units = config.weighting.unit, method_class(config).units
    if unit not in units:
        raise UserError(
            f"weighting.unit {unit}: expected {' or '.join(sorted(units))} with policy "
            f"{config.policy.name}"
        )
    pools = method_class(config).pool_batches(config)
    if pools > 1 and unit != "sample":
        raise UserError(
            f"weighting.unit {unit}: expected sample with weighting.pool_batches {pools}: whole "
            "samples are chosen from a pool"
        )
    for problem in method_class(config).problems(config, num_layers, world_size):
        raise UserError(problem)
