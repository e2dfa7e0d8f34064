"""Training of the LLM: the learner, one step, one weighting update, one evaluation."""

from megatron_dwm.training.learner import Learner, build_learner
from megatron_dwm.training.step import Skipped, Spike, StepOutcome, Taken, train_step
from megatron_dwm.training.target import TargetRead, read_target
from megatron_dwm.training.update import (
    Ahead,
    OwnUpdateResult,
    UpdateResult,
    UpperLevel,
    weighting_update,
)

__all__ = [
    "Ahead",
    "Learner",
    "OwnUpdateResult",
    "Skipped",
    "Spike",
    "StepOutcome",
    "Taken",
    "TargetRead",
    "UpdateResult",
    "UpperLevel",
    "build_learner",
    "read_target",
    "train_step",
    "weighting_update",
]
