"""The records of a run: metrics.jsonl, curves, and weights/*.parquet.

Only the main process writes. A resumed run first drops the records after its checkpoint
(recorded.py), so every step appears once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config
from megatron_dwm.data import Origins
from megatron_dwm.files.atomic import new_file
from megatron_dwm.run.parquet_records import ORIGIN_FIELDS, ParquetRecords, origin_columns
from megatron_dwm.run.recorded import drop_records_after, set_aside
from megatron_dwm.run.tensorboard import Axis, Board
from megatron_dwm.run.wandb_board import WandbBoard
from megatron_dwm.weighting.concentration import effective_sample_size, normalized_entropy

_WEIGHT_SCHEMA = pa.schema(
    [
        *ORIGIN_FIELDS,
        ("tokens", pa.int32()),
        ("loss", pa.float32()),
        ("weight", pa.float32()),
        ("alignment", pa.float32()),
    ]
)
"""one row per weight, which is one per unit

tokens: of the unit, as the model reads them. loss: their mean loss, in nats
alignment: empty if there was no update, or if the update did not compute it
"""


STATISTICS = (
    *("weight_mean", "weight_std", "weight_min", "weight_max"),
    *("weight_effective_sample_size", "weight_entropy"),
)


def weight_statistics(weights_n: Tensor, sizes_n: Tensor | None = None) -> Tensor:
    """Returns `STATISTICS` of a global batch's weights, on their device.

    The last two are fractions of their largest value. sizes_n: how much each unit counts; None: all
    the same.
    """
    if sizes_n is None:
        moments = [weights_n.mean(), weights_n.std(correction=0)]
        limits = [weights_n.min(), weights_n.max()]
    else:
        mean = (sizes_n * weights_n).sum() / sizes_n.sum()
        variance = (sizes_n * (weights_n - mean).square()).sum() / sizes_n.sum()
        counted_n = weights_n[sizes_n > 0]
        moments, limits = [mean, variance.sqrt()], [counted_n.min(), counted_n.max()]
    concentration = [
        effective_sample_size(weights_n, sizes_n),
        normalized_entropy(weights_n, sizes_n),
    ]
    return torch.stack([*moments, *limits, *concentration])


class MetricsWriter:
    """Appends to metrics.jsonl, one object per line, and to TensorBoard and W&B.

    If the disk is full, lines are kept and written when there is space again. The file stays open,
    so that it can be restored if it was removed.
    """

    def __init__(self, run_dir: Path, config: Config, warn: Callable[[str], None]) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._file = self._path.open("a+b", buffering=0)
        self._pending = b""
        self._warn = warn
        self._boards: list[Board | WandbBoard] = []
        if config.logging.tensorboard:
            self._boards.append(Board(run_dir / "tensorboard", warn))
        if config.logging.wandb_project is not None:
            self._boards.append(WandbBoard(run_dir, config, warn))

    def write(self, line: dict[str, Any]) -> None:
        """Write one line, and curves `phase/key`; those of updates are over their numbers."""
        had_room = not self._pending
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if had_room:
                self._warn(f"{self._path}: {error.strerror}; lines are kept until there is room")
        curves = {f"{line['phase']}/{name}": value for name, value in _scalars(line).items()}
        axis: Axis = "update" if "update" in line else "step"
        self.curves(axis, line[axis], curves)

    def curves(self, axis: Axis, number: int, curves: Mapping[str, float]) -> None:
        """Give the boards the values of curves at a step or at an update."""
        for board in self._boards:
            board.add(axis, number, curves)

    def histogram(self, step: int, name: str, values_n: Tensor) -> None:
        """Give the boards the distribution of values at a step."""
        for board in self._boards:
            board.histogram(step, name, values_n)

    def reopen_at(self, state: TrainState) -> None:
        """Drop the records after `state`."""
        self._file.close()
        self._pending = b""
        drop_records_after(self._path.parent, state, self._warn)
        self._file = self._path.open("a+b", buffering=0)

    def restore(self) -> None:
        """Write the file again if it was removed or replaced by another one.

        Raises OSError.
        """
        found = self._path.stat() if self._path.exists() else None
        if found and os.path.samestat(found, os.fstat(self._file.fileno())):
            return
        aside = set_aside(self._path, "replaced") if found else None
        self._copy_back()
        kept = f"; the file that replaced it is now {aside.name}" if aside else ""
        self._warn(f"{self._path} was removed: it is written again{kept}")

    def _copy_back(self) -> None:
        with new_file(self._path) as partial, partial.open("wb") as copy:
            self._file.seek(0)
            shutil.copyfileobj(self._file, copy)
        self._file.close()
        self._file = self._path.open("a+b", buffering=0)

    def close(self) -> None:
        """Close the file and the boards."""
        self._file.close()
        for board in self._boards:
            board.close()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    flat = {name: value for name, value in line.items() if isinstance(value, (int, float))}
    for domain, value in line.get("domain_loss", {}).items():
        flat[f"domain_loss/{domain}"] = value
    del flat["step"]
    return flat


class WeightRecorder:
    """Collects the weights of units and writes them, one Parquet file per checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self.records = ParquetRecords(run_dir / "weights", _WEIGHT_SCHEMA)

    def add(
        self,
        step: int,
        stage: int,
        origins: Origins,
        losses_n: Tensor,
        weights_n: Tensor,
        alignment_n: Tensor | None,
    ) -> None:
        """Keep the weights of a global batch.

        alignment_n: NaN where it is not known; None if no update computed it.
        """
        rows = len(origins.domains)
        found = [None] * rows if alignment_n is None else alignment_n.tolist()
        alignment = [None if value != value else value for value in found]
        columns: list[list[Any]] = [
            *origin_columns(step, stage, origins),
            origins.tokens_U.tolist(),
            losses_n.tolist(),
            weights_n.tolist(),
            alignment,
        ]
        self.records.keep(step, columns)
