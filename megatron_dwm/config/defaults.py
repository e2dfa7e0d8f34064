"""The form of an update and of the weighting model, whose defaults follow from other keys.

A configuration that is loaded has their values written out, so that a run's config.yaml says what
it does, whatever later versions take as default.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from megatron_dwm.config.schema import Config


def with_defaults(config: Config) -> Config:
    """Returns the configuration with the values that its empty keys stand for."""
    weighting = replace(
        config.weighting,
        update_on=config.update_on,
        across_samples=config.weighting.attends_across_samples,
    )
    return replace(config, weighting=weighting)


# What a run did before its config.yaml named these keys.
_BEFORE: dict[str, Any] = {"update_on": "fresh", "across_samples": True}


def with_earlier_defaults(config: Config, named: Set[str]) -> Config:
    """Returns the configuration of a run that an earlier version may have written.

    named: the dotted keys that it names. Each of the others had the value that the code had before
    there was the key.
    """
    absent = {key: value for key, value in _BEFORE.items() if f"weighting.{key}" not in named}
    return replace(config, weighting=replace(config.weighting, **absent))
