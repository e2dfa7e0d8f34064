"""Training of the LLM: the learner, one step, one weighting update, one evaluation."""

from megatron_dwm.training.learner import Learner, build_learner
from megatron_dwm.training.step import Skipped, Spike, StepOutcome, Taken, train_step
from megatron_dwm.training.update import (
    OwnUpdateResult,
    UpdateResult,
    UpperLevel,
    weighting_update,
)

__all__ = [
    "Learner",
    "OwnUpdateResult",
    "Skipped",
    "Spike",
    "StepOutcome",
    "Taken",
    "UpdateResult",
    "UpperLevel",
    "build_learner",
    "train_step",
    "weighting_update",
]
