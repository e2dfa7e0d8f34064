"""Faults that are put into one rank of a run, at an exact place of the loop.

Each replaces one function by one that does the damage and then calls it. Ranks and steps are those
of the order; what is injected is the real thing: a signal of the kernel, a NaN in the batch.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint import sharded_files
from megatron_dwm.data import Feed
from megatron_dwm.run import checks, loop, start, upkeep, weighting_files

_PLACES: dict[str, tuple[Any, str]] = {
    "checking": (checks, "check_data"),
    "resuming": (start, "newest_whole_checkpoint"),
    "building": (start, "build_job"),
    "loading": (start, "load_job"),
    "training": (loop, "train_step"),
    "weighting": (loop, "weighting_update"),
    "reading": (loop, "read_target"),
    "evaluation": (upkeep, "evaluate"),
    "checkpoint": (sharded_files.ShardedFiles, "write"),
    "weighting model": (weighting_files, "move_files"),
}


def _before(place: str, call: int, act: Callable[[], None]) -> None:
    """Call `act` before call number `call` (from 1) of a place."""
    owner, name = _PLACES[place]
    upstream, count = getattr(owner, name), 0

    def with_fault(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            act()
        return upstream(*args, **options)

    setattr(owner, name, with_fault)


def send_signal(*, place: str, call: int, number: int, rank: int) -> None:
    """The rank gets signal `number` when it comes to a place."""
    if int(os.environ["RANK"]) == rank:
        _before(place, call, lambda: os.kill(os.getpid(), number))


def kill_between_model_files(*, call: int) -> None:
    """SIGKILL before file number `call` (from 1) of a weighting model gets its name."""
    upstream, count = Path.replace, 0

    def with_fault(self: Path, target: Path) -> Path:
        nonlocal count
        count += self.parent.name.startswith("stage_")
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return upstream(self, target)

    Path.replace = with_fault  # type: ignore[method-assign]


def two_signals(*, place: str, call: int, apart_s: float) -> None:
    """SIGTERM, and another one while the same call still runs."""

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(apart_s)
        os.kill(os.getpid(), signal.SIGTERM)

    _before(place, call, act)


def touch(*, place: str, call: int, file: str) -> None:
    """A user makes a file."""
    _before(place, call, lambda: Path(file).touch())


def remove(*, place: str, call: int, paths: list[str]) -> None:
    """A user removes files or folders, seen by all ranks; the main one is told to."""

    def act() -> None:
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    if int(os.environ["RANK"]) == 0:
        _before(place, call, act)


def fill(*, place: str, call: int, folder: str) -> None:
    """Something else takes all the room of a file system."""

    def act() -> None:
        with suppress(OSError), (Path(folder) / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                continue

    _before(place, call, act)


def replace_file(*, place: str, call: int, path: str, text: str) -> None:
    """A user's editor puts another file into the place of one."""

    def act() -> None:
        Path(f"{path}.new").write_text(text)
        Path(f"{path}.new").rename(path)

    _before(place, call, act)


def nan_batches(*, steps: list[int], rank: int) -> None:
    """The loss mask of these steps (from 1) holds a NaN on one rank."""
    _change_batches(steps, rank, float("nan"))


def nan_evaluation(*, call: int) -> None:
    """Evaluation number `call` (from 1) finds a loss that is not a number, in its last domain."""
    upstream, count = upkeep.evaluate, 0

    def evaluate(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        found = upstream(*args, **options)
        if count < call:
            return found
        return replace(found, losses={**found.losses, max(found.losses): float("nan")})

    upkeep.evaluate = evaluate


def spike_batches(*, steps: list[int]) -> None:
    """The labels of these steps (from 1) are not what follows in the text."""
    upstream = Feed.training

    def shuffled(feed: Feed, number: int) -> Any:
        batch = upstream(feed, number)
        if number + 1 not in steps:
            return batch
        return replace(batch, labels_BS=(batch.labels_BS * 7 + 131) % 512)

    Feed.training = shuffled


def _change_batches(steps: list[int], rank: int, value: float) -> None:
    upstream = Feed.training

    def changed(feed: Feed, number: int) -> Any:
        batch = upstream(feed, number)
        if number + 1 not in steps or int(os.environ["RANK"]) != rank:
            return batch
        mask_BS = batch.loss_mask_BS.clone()
        mask_BS[0, 0] = value
        return replace(batch, loss_mask_BS=mask_BS)

    Feed.training = changed


def wrong_weights(*, step: int, value: float) -> None:
    """The policy gives a weight that is none."""
    from megatron_dwm.weighting.uniform import Uniform

    upstream, count = Uniform.weights, 0

    def wrong(self: Uniform, *args: Any) -> Any:
        nonlocal count
        count += 1
        weights_n = upstream(self, *args)
        if count == step:
            weights_n[0] = value
        return weights_n

    Uniform.weights = wrong


def slow_steps(*, seconds: float) -> None:
    """Every step takes at least so long, so that something can happen to it."""
    upstream = loop.train_step

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return upstream(*args, **options)

    loop.train_step = slow
