"""Requests to stop or to save, which every process sees at the same point of the loop.

SIGTERM, SIGUSR1 and SIGUSR2, or a file `stop` in the run directory, ask for a checkpoint and the
end of the run; a file `save` asks for a checkpoint. A signal may reach one process only, so every
poll is one all-reduce of four bytes over the world (none in one process), and four look-ups of file
names in the main process. The poll removes a file that it has seen. It also ends a run whose
directory is gone.

Before the loop begins the signals keep their default action, the end of the process. So they work
at once, also while the process waits for a peer, when Python would not run a handler.

A second signal ends the process at once. Launchers and Slurm both deliver the first signal, so a
signal within `REPEAT_S` of the first counts as the same one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_dwm.config import RunError
from megatron_dwm.runtime.bring_up import Runtime

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_S = 2.0


class Request(IntEnum):
    """A request to the run; of several, the largest counts."""

    NONE = 0
    SAVE = 1
    STOP = 2
    LOST = 3


class StopSignals:
    """The first stop signal that this process received."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first_s = 0.0

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Record a signal; a second one gets its default action, which ends the process."""
        now_s = time.monotonic()
        if self.received is not None and now_s - self._first_s > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received, self._first_s = signal.Signals(number), now_s


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Record signals instead of obeying them during the context (main thread only)."""
    received = StopSignals()
    before = {number: signal.signal(number, received) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopPoll:
    """Polls for requests; every process gets the same answer."""

    def __init__(
        self,
        runtime: Runtime,
        run_dir: Path,
        signals: StopSignals,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """is_lost: returns True if the run directory is gone; only the main process calls it.

        `found_file` is true, in the main process, once it has seen the file `stop`.
        """
        self._runtime = runtime
        self._is_lost = is_lost
        self._run_dir = run_dir
        self._signals = signals
        self.found_file = False
        self._answer = torch.zeros(1, dtype=torch.int32, device=runtime.device)

    def poll(self) -> Request:
        """Returns the largest request since the last poll; a signal's STOP stays (collective).

        Raises RunError, on every rank, if the run directory is gone.
        """
        mine = Request.NONE if self._signals.received is None else Request.STOP
        if self._runtime.is_main:
            mine = Request.LOST if self._is_lost() else max(mine, self._from_files())
        if self._runtime.world_size > 1:
            self._answer.fill_(int(mine))
            dist.all_reduce(self._answer, op=dist.ReduceOp.MAX)
            mine = Request(int(self._answer))
        if self._runtime.peers is not None:
            self._runtime.peers.heard()
        if mine is Request.LOST:
            raise RunError(
                f"run.dir: {self._run_dir} was removed, moved or replaced during training, so the "
                "steps since the last checkpoint cannot be saved; put the directory back, or name "
                "its new path, and continue with --run.resume true"
            )
        return mine

    @property
    def reason(self) -> str:
        """The reason why the run stops, as far as this process knows."""
        if self._signals.received is not None:
            return self._signals.received.name
        return "the file stop" if self.found_file else "a signal to another rank"

    def _from_files(self) -> Request:
        found = Request.NONE
        for name, request in (("save", Request.SAVE), ("stop", Request.STOP)):
            file = self._run_dir / name
            if file.exists():
                file.unlink(missing_ok=True)
                found = request
                self.found_file |= request is Request.STOP
        return found
