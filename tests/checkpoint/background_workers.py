"""What the ranks of tests/checkpoint/test_background.py run."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.checkpoint import save
from megatron_dwm.checkpoint.load import load_checkpoint
from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.save import CheckpointSave
from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.weighting.uniform import Uniform
from tests.tiny import Tiny, tiny


class Remembers(Uniform):
    """A method whose state is a tensor that it changes in place."""

    def __init__(self) -> None:
        self.seen = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen.copy_(state["seen"])


def _everything(subject: Tiny, method: Remembers) -> list[Tensor]:
    chained = subject.optimizer.chained_optimizers
    states = [one for each in chained for one in each.optimizer.state.values()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return [*subject.llm.parameters(), *moments, method.seen]


def saved_while_training(run_dir: str, **layout: Any) -> tuple[bool, bool, bool]:
    """Whether all changed while the files waited, came back, and the counters, too."""
    with tiny(**layout) as subject:
        method, state, may_write = Remembers(), TrainState(step=4), Event()
        parts = Parts(
            llm=subject.llm,
            optimizer=subject.optimizer,
            method_name="remembers",
            method=method,
            state=state,
        )
        before = [each.detach().clone() for each in _everything(subject, method)]
        upstream = CheckpointSave._write

        def held_back(waiting: CheckpointSave) -> None:
            may_write.wait(60)
            upstream(waiting)

        CheckpointSave._write = held_back  # type: ignore[method-assign]
        try:
            started = CheckpointSave(parts, Path(run_dir), {}, plans={}, background=True)
        finally:
            CheckpointSave._write = upstream  # type: ignore[method-assign]
        subject.train(2)
        method.seen.add_(1.0)
        state.step += 2
        later = [each.detach().clone() for each in _everything(subject, method)]
        changed = all(not torch.equal(a, b) for a, b in zip(later, before, strict=True))
        may_write.set()
        load_checkpoint(parts, started.finish())
        now = _everything(subject, method)
        same = all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        return changed, same, state.step == 4


def save_without_memory(run_dir: str) -> tuple[str, list[str]]:
    """What a save says whose thread ends by an error that nothing expects, and what it leaves."""
    with tiny() as subject:
        state, upstream = TrainState(step=4), save.try_write
        parts = Parts(
            llm=subject.llm,
            optimizer=subject.optimizer,
            method_name="remembers",
            method=Remembers(),
            state=state,
        )

        def fails(files: object) -> str | None:
            if subject.runtime.rank == subject.runtime.world_size - 1:
                raise MemoryError
            return upstream(files)  # type: ignore[arg-type]

        save.try_write = fails
        try:
            started = CheckpointSave(parts, Path(run_dir), {}, plans={}, background=True)
            started.finish()
        except SaveError as error:
            said = str(error)
        else:
            said = "nothing"
        finally:
            save.try_write = upstream
        return said, [path.name for path in list_checkpoints(Path(run_dir))]
