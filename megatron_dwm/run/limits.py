"""Decides when a run ends itself: too many bad steps in a row, or losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import TrainingConfig

_MEMORY = 0.98


def running_mean(mean: float | None, loss: float) -> float:
    """Returns the running mean of the loss over about the last 50 steps, to find spikes."""
    return loss if mean is None else _MEMORY * mean + (1.0 - _MEMORY) * loss


def largest_loss(config: TrainingConfig, mean: float | None) -> float | None:
    """Returns the loss above which a batch is a spike; None if there is no limit."""
    return config.spike_factor * mean if config.spike_factor and mean is not None else None


def too_many_skipped(
    config: TrainingConfig, state: TrainState, reason: str, samples: range
) -> str | None:
    """Returns why the run ends after the step that was just skipped; None if it continues."""
    if state.skipped_in_a_row <= config.max_skipped_steps:
        return None
    return (
        f"step {state.step}: {reason}; {state.skipped_in_a_row} steps in a row were not "
        f"finite (training.max_skipped_steps {config.max_skipped_steps}); "
        f"samples {samples.start} to {samples.stop - 1}; continue from the last checkpoint with a "
        "smaller training.learning_rate, or look at these samples"
    )


def too_many_spikes(config: TrainingConfig, spikes: list[int], step: int) -> str | None:
    """Returns why the run ends after a spike at `step` (from 1); None if it continues.

    So many spikes in a row are not caused by single batches.
    """
    limit = config.max_skipped_steps
    if not set(range(step - limit, step + 1)) <= set(spikes):
        return None
    return (
        f"step {step}: the losses of {limit + 1} batches in a row were spikes "
        f"(training.max_skipped_steps {limit}, training.spike_factor "
        f"{config.spike_factor:g}); continue from the last checkpoint with a smaller "
        "training.learning_rate or a larger factor"
    )


def not_finite(losses: Mapping[str, float], step: int) -> str | None:
    """Returns why the run ends after an evaluation; None if it continues."""
    if all(map(math.isfinite, losses.values())):
        return None
    return (
        f"step {step}: held-out loss {losses}; continue from the last checkpoint with a smaller "
        "training.learning_rate"
    )
