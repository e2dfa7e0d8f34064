"""How far a run has been saved, without starting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, UserError
from megatron_dwm.files.run_names import STOPPED


@dataclass(frozen=True, kw_only=True)
class Status:
    """The newest checkpoint, "none" if there is none, and what is left to do after it.

    was_stopped: the file `stop` ended the last attempt.
    """

    run_dir: str
    checkpoint: str
    steps: int
    is_finished: bool
    was_stopped: bool

    def __str__(self) -> str:
        """Returns the status in one line."""
        end = "finished" if self.is_finished else "not finished"
        why = "; the file stop ended it" if self.was_stopped else ""
        return f"{self.run_dir}: checkpoint {self.checkpoint}, of {self.steps} steps: {end}{why}"


def is_finished(config: Config, state: TrainState) -> bool:
    """True if a run at `state` has neither a step nor its last evaluation left."""
    evaluated = not config.evaluation.is_on or state.evaluated_step == state.step
    return state.step > config.training.steps or (state.step == config.training.steps and evaluated)


def saved_status(config: Config) -> Status:
    """Returns the status of the newest checkpoint that has a sound manifest."""
    checkpoint, state = "none", TrainState()
    for directory in reversed(list_checkpoints(Path(config.run.dir))):
        try:
            checkpoint, state = directory.name, read_manifest(directory).state
        except UserError:  # a newer version's, which a run refuses, too
            raise
        except ValueError:  # the run sets it aside when it starts
            continue
        break
    return Status(
        run_dir=config.run.dir,
        checkpoint=checkpoint,
        steps=config.training.steps,
        is_finished=is_finished(config, state),
        was_stopped=(Path(config.run.dir) / STOPPED).exists(),
    )
