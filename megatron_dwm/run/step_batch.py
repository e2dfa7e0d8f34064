"""The batch of the next step: as the feed has it, or chosen from its pool."""

from __future__ import annotations

from megatron_dwm.data import Batch
from megatron_dwm.run.job import Job
from megatron_dwm.training.pool import choose_rows
from megatron_dwm.weighting import ChoosesFromPool


def step_batch(job: Job) -> Batch:
    """Returns this replica's rows of the next step's batch (collective with pools).

    Raises RunError if too few candidates of a pool have finite scores.
    """
    feed, step = job.feed, job.state.step
    batch = feed.training(step)
    if feed.pool_batches == 1:
        return batch
    assert isinstance(job.method, ChoosesFromPool)
    passages = feed.validation(step) if job.method.reads_passages else None
    count = feed.global_batch_size
    rows = choose_rows(job.learner, job.method, batch, passages, job.state, count=count)
    return feed.chosen(step, rows)
