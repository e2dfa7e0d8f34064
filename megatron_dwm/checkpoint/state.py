"""Where a run stands: everything besides tensors that a resumed run needs.

The data needs no cursor of its own: training sample ids follow from `step`, the weighting model's
training samples and validation batches from `updates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Counters; the only mutable record of the loop.

    step: LLM steps taken, or skipped.  updates: weighting updates made, over all stages.
    stage_updates: updates made of the stage that is under way.
    tokens: training tokens read by LLM steps.  seconds: wall-clock of the loop.
    evaluated_step: the last step after which the held-out loss was measured.
    skipped: steps skipped, over the whole run.  skipped_in_a_row: up to now without a step taken.
    passed_over: numbers of steps (from 1) whose batch is not trained on, after a spike of the loss.
    weighings: global batches that the weighting model has weighed, of steps and of updates.
    mean_loss: running mean that a spike is measured by; None before the first step.
    """

    step: int = 0
    updates: int = 0
    stage_updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    passed_over: list[int] = field(default_factory=list)
    mean_loss: float | None = None
    weighings: int = 0
