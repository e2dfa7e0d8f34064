"""Where a run stands: everything besides tensors that a resumed run needs.

The data needs no cursor of its own: training sample ids follow from `step`, the weighting model's
training samples and validation batches from `updates`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Counters; the only mutable record of the loop.

    step: LLM steps taken.  updates: weighting updates made, over all stages.
    stage_updates: updates made of the stage that is under way.
    tokens: training tokens read by LLM steps.  seconds: wall-clock of the loop.
    """

    step: int = 0
    updates: int = 0
    stage_updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
