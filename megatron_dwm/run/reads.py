"""Which samples the steps and the updates of a run read: the mapping from samples to steps."""

from __future__ import annotations

from megatron_dwm.config import Config
from megatron_dwm.data.shares import ReadSteps
from megatron_dwm.weighting import method_class


def training_reads(config: Config) -> ReadSteps:
    """Returns the steps at which the samples of the training stream are read, pools included."""
    batches = method_class(config).pool_batches(config)
    return ReadSteps(
        steps=range(config.training.steps),
        samples_each=batches * config.training.global_batch_size,
    )


def update_reads(config: Config) -> ReadSteps | None:
    """Returns the steps before which the samples of fresh updates are read; None without any."""
    schedule = method_class(config).schedule(config)
    if not (schedule.num_updates and schedule.fresh):
        return None
    return ReadSteps(
        steps=schedule.update_steps,
        samples_each=schedule.updates_each * config.training.global_batch_size,
    )
