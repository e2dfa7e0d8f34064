"""Writes TensorBoard's event files in addition to metrics.jsonl.

The format is TensorBoard's. Its own writer has a thread that opens the file by name for every
write; if the disk is full or the folder was removed, the thread fails with a traceback, and then
the run. Here the file stays open, and an error of the disk ends the curves but not the run.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, scalar

_VERSION = "brain.Event:2"
# Of a histogram; numpy's rule may ask for millions where a few weights are far from the others.
_BINS = 40
Axis: TypeAlias = Literal["step", "update"]
"""what the abscissa of a curve counts: updates have an axis of their own"""


class Board:
    """Writes scalars and histograms into one new event file of a folder."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"{name}.{time.monotonic_ns()}"
        self._records: RecordWriter | None = None
        try:
            folder.mkdir(exist_ok=True)
            self._records = RecordWriter(self._path.open("xb"))
        except OSError as error:
            self._warn_of(error)
        self._write([Event(wall_time=time.time(), file_version=_VERSION)])

    def add(self, axis: Axis, number: int, scalars: Mapping[str, float]) -> None:
        """Write values of curves; keys are their names. axis: what `number` counts."""
        del axis  # TensorBoard calls every abscissa a step
        now_s = time.time()
        self._write(
            [
                Event(wall_time=now_s, step=number, summary=scalar(name, value))
                for name, value in scalars.items()
            ]
        )

    def histogram(self, step: int, name: str, values_n: Tensor) -> None:
        """Write the distribution of values."""
        found = histogram(name, values_n.float().cpu().numpy(), bins=_BINS)
        self._write([Event(wall_time=time.time(), step=step, summary=found)])

    def close(self) -> None:
        """Close the file."""
        records, self._records = self._records, None
        if records is not None:
            with suppress(OSError):  # the warning was printed before
                records.close()

    def _write(self, events: list[Event]) -> None:
        if self._records is None:
            return
        try:
            for event in events:
                self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._warn_of(error)
            self.close()

    def _warn_of(self, error: OSError) -> None:
        self._warn(f"{self._path}: {error.strerror}; TensorBoard has no curves from here on")
