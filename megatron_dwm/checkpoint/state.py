"""The counters of a run: everything except tensors that a resumed run needs.

The data needs no cursor: training sample ids follow from `step`; samples of weighting updates and
validation batches follow from `updates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOT_EVALUATED = -1


@dataclass
class TrainState:
    """Counters; the only mutable record of the loop.

    step: LLM steps taken or skipped. updates: weighting updates made, over all stages.
    stage_updates: updates made in the current stage.
    tokens: training tokens read by LLM steps. seconds: wall-clock time of the loop.
    evaluated_step: the last step after which the held-out loss was measured; NOT_EVALUATED before
        the first, if that comes before the first step.
    skipped: steps skipped in the whole run. skipped_in_a_row: steps skipped since the last one
    taken. passed_over: numbers of steps (from 1) whose batch is skipped after a spike of the loss.
    weighings: global batches that a method weighed, in steps and in updates.
    mean_loss: running mean of the loss, to find spikes; None before the first step.
    costs: FLOPs by part, by which the job counts (weighting/costs.py); None if it was not recorded.
    flops_offset: what earlier jobs have spent more than these costs say, as `Costs.totals` has it:
        another layout or method costs other FLOPs.
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
    costs: dict[str, Any] | None = None
    flops_offset: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
