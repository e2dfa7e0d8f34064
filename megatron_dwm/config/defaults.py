"""Keys whose default follows from other keys.

A configuration that is loaded has their values written out, so that a run's config.yaml says what
it does, whatever later versions take as default.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_dwm.config.schema import Config


def with_defaults(config: Config) -> Config:
    """Returns the configuration with the values that its empty keys stand for."""
    weighting = replace(
        config.weighting,
        update_on=config.update_on,
        across_samples=config.weighting.attends_across_samples,
    )
    return replace(config, weighting=weighting)
