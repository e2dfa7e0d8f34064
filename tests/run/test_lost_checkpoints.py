"""A run directory that had checkpoints and has none is told from one that never had one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.config import TrainingConfig, UserError
from megatron_dwm.run.resume import require_no_loss
from tests.run.foreign_lines import FOREIGN


@pytest.mark.parametrize(
    ("taken", "skipped", "background", "refused"),
    [
        (range(1, 11), (), False, False),  # killed in the first save
        (range(1, 12), (), False, True),
        (range(1, 21), (), False, True),
        (range(1, 21), (), True, False),  # the first may have been on its way
        (range(1, 22), (), True, True),
        ((*range(1, 10), 15), range(10, 15), False, False),  # a save waits for the end of trouble
        ((*range(1, 10), 15, 16), range(10, 15), False, True),
        ((*range(1, 10), 25, 26), range(10, 25), True, False),
        ((), range(1, 30), False, False),
    ],
    ids=str,
)
def test_steps_show_that_there_was_a_checkpoint(
    tmp_path: Path, taken: range, skipped: range, background: bool, refused: bool
) -> None:
    """In a run of an older version, at an interval of 10."""
    lines = [{"step": step, "phase": "train"} for step in taken]
    lines += [{"step": step, "phase": "skipped"} for step in skipped]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    training = TrainingConfig(checkpoint_interval_steps=10, checkpoint_async=background)
    if refused:
        with pytest.raises(UserError, match="steps are recorded"):
            require_no_loss(tmp_path, training)
    else:
        require_no_loss(tmp_path, training)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_line_does_not_hide_that_a_run_lost_its_checkpoints(
    tmp_path: Path, name: str
) -> None:
    lines = [json.dumps({"step": step, "phase": "train"}).encode() for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([FOREIGN[name], *lines]))
    with pytest.raises(UserError, match="20 steps are recorded"):
        require_no_loss(tmp_path, TrainingConfig(checkpoint_interval_steps=10))
