"""Finds a method's class by its name: of the package (config/methods.py), or of the user."""

from __future__ import annotations

import importlib
from dataclasses import replace

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.methods import METHODS, name_problems
from megatron_dwm.config.options import resolved_options
from megatron_dwm.weighting.method import Method
from megatron_dwm.weighting.plugin_checks import plugin_class, pool_problem, update_problem


def method_class(config: Config) -> type[Method]:
    """Returns the class of `policy.name`.

    Raises UserError if there is none, and for a class outside the package that cannot be used.
    """
    name = config.policy.name
    for problem in name_problems(name):
        raise UserError(problem)
    if name not in METHODS:
        return plugin_class(name)
    module, attribute = METHODS[name].path.split(":")
    return getattr(importlib.import_module(module), attribute)


def with_options(config: Config) -> Config:
    """Returns the configuration with the values of all the method's options, defaults included.

    Without the options in a file that are another method's. Raises UserError for options that the
    method does not have.
    """
    method, policy = method_class(config), config.policy
    given = {} if policy.name in METHODS else policy.options
    options = resolved_options(method.options, given, policy.name)
    return replace(config, policy=replace(policy, options=options))


def learns(config: Config) -> bool:
    """True if the run's method reads hypergradients."""
    return "hypergradients" in method_class(config).parts(config)


def check_method(config: Config, num_layers: int, world_size: int) -> None:
    """Raise UserError for the first of the method's rules that the configuration breaks.

    num_layers: layers of the LLM. world_size: number of processes.
    """
    with_options(config)
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
    for check in (update_problem, pool_problem):
        if (lacks := check(config, method_class(config))) is not None:
            raise UserError(f"policy.name {config.policy.name}: {lacks} (docs/plugins.md)")
