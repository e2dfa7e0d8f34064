"""weighting/stage_K of a run: its weighting model, as `weighting.load` of another run takes it.

It is written at the end of every stage and with every checkpoint, so that a run that is stopped or
killed leaves the model of its last checkpoint. At every moment the directory is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_dwm.training.session import Session
from megatron_dwm.training.stages import Stage
from megatron_dwm.weighting import LearningPolicy


def save_weighting_model(session: Session, stage: Stage, warn: Callable[[str], None]) -> None:
    """Write what the policy has learned, on the main process; a full disk costs it, not the run."""
    policy = session.policy
    if not session.runtime.is_main or not isinstance(policy, LearningPolicy):
        return
    directory = session.run_dir / "weighting" / f"stage_{stage.number}"
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(exist_ok=True)  # not the run directory, if it was removed
        policy.save(partial)
        _publish(partial, directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        warn(f"{directory} could not be written: {error}")


def _publish(partial: Path, directory: Path) -> None:
    """Give the files their place, one rename each.

    What a run describes its model with does not change, so its tensors of this moment go with the
    description of an earlier one: no order of the renames, cut short anywhere, leaves a mixture.
    """
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if not directory.exists():
        partial.rename(directory)
        return
    for file in partial.iterdir():
        file.replace(directory / file.name)
    partial.rmdir()
