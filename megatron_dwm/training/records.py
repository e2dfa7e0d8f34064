"""What a run leaves to read: metrics.jsonl, TensorBoard events and weights/*.parquet.

Only the main process writes. A resumed run first drops what lies beyond its checkpoint, so every
step appears once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megatron_dwm.data.batch import Batch
from megatron_dwm.training.state import TrainState
from megatron_dwm.weighting.concentration import effective_sample_size, normalised_entropy

Source = Literal["training", "update", "target"]
"""which numbering a sample's id belongs to"""

_WEIGHT_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("stage", pa.int32()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("sample_id", pa.int64()),
        ("document_id", pa.int64()),
        ("domain", pa.dictionary(pa.int32(), pa.string())),
        ("weight", pa.float32()),
        ("alignment", pa.float32()),
    ]
)
"""One row a weight. source: what sample_id and document_id count in, as three numberings start
from 0: samples that the LLM trains on (training), samples that a weighting update drew for itself
(update), passages of the target that are mixed into the batch (target). alignment: empty where no
update was made."""

_UPDATES = b"updates"
"""key of a Parquet file's metadata: weighting updates made when it was written"""
_STEP_PHASES = ("train", "skipped")


def weight_statistics(weights_n: Tensor) -> dict[str, float]:
    """Statistics of a global batch's weights; size and entropy are fractions of the largest."""
    return {
        "weight_mean": float(weights_n.mean()),
        "weight_std": float(weights_n.std(correction=0)),
        "weight_min": float(weights_n.min()),
        "weight_max": float(weights_n.max()),
        "weight_effective_sample_size": float(effective_sample_size(weights_n)),
        "weight_entropy": float(normalised_entropy(weights_n)),
    }


class MetricsWriter:
    """Appends to metrics.jsonl, one object a line, and to TensorBoard.

    What a full disk does not take is kept, and written when there is room again.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, warn: Callable[[str], None]) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._pending = b""
        self._warn = warn
        self._board = SummaryWriter(str(run_dir / "tensorboard")) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Write one line; its `phase` and `step` name the TensorBoard series and abscissa."""
        had_room = not self._pending
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if had_room:
                self._warn(f"{self._path}: {error.strerror}; lines are kept until there is room")
        if self._board is None:
            return
        for name, value in _scalars(line).items():
            self._board.add_scalar(f"{line['phase']}/{name}", value, line["step"])

    def reopen_at(self, state: TrainState) -> None:
        """Forget what comes after `state`."""
        self._file.close()
        self._pending = b""
        drop_records_after(self._path.parent, state)
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    flat = {name: value for name, value in line.items() if isinstance(value, (int, float))}
    for domain, value in line.get("domain_loss", {}).items():
        flat[f"domain_loss/{domain}"] = value
    flat.pop("step")
    return flat


class WeightRecorder:
    """Collects weights by sample and writes them, a Parquet file a checkpoint interval."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir / "weights"
        self._tables: list[pa.Table] = []
        self._steps: list[int] = []

    def add(
        self,
        step: int,
        stage: int,
        batch: Batch,
        weights_n: Tensor,
        alignment_n: Tensor | None,
        *,
        sources: Sequence[Source],
    ) -> None:
        """Keep the weights of a global batch; `alignment_n` where an update computed it.

        sources: one a row.
        """
        rows = batch.size
        alignment = [None] * rows if alignment_n is None else alignment_n.tolist()
        columns = [
            [step] * rows,
            [stage] * rows,
            list(sources),
            batch.sample_ids_B.tolist(),
            batch.document_ids_B.tolist(),
            list(batch.domains),
            weights_n.tolist(),
            alignment,
        ]
        arrays = [
            pa.array(column, type=field.type)
            for column, field in zip(columns, _WEIGHT_SCHEMA, strict=True)
        ]
        self._tables.append(pa.Table.from_arrays(arrays, schema=_WEIGHT_SCHEMA))
        self._steps.append(step)

    def forget(self) -> None:
        """Drop what has not been written."""
        self._tables, self._steps = [], []

    def flush(self, updates: int) -> None:
        """Write what was kept since the last call as one file, marked with the updates so far.

        Raises OSError if the disk refuses; everything is then still kept.
        """
        if not self._tables:
            return
        self._dir.mkdir(exist_ok=True)
        name = f"steps_{self._steps[0]:08d}_{self._steps[-1]:08d}.parquet"
        partial = self._dir / f".{name}.partial"
        table = pa.concat_tables(self._tables).unify_dictionaries()
        pq.write_table(table.replace_schema_metadata({_UPDATES: str(updates)}), partial)
        partial.rename(self._dir / _free_name(self._dir, name))
        self.forget()


def _free_name(directory: Path, name: str) -> str:
    """`name`, or with a letter behind where two intervals begin and end alike."""
    stem = name.removesuffix(".parquet")
    names = [name, *(f"{stem}_{number}.parquet" for number in range(1, 1000))]
    return next(candidate for candidate in names if not (directory / candidate).exists())


def recorded_steps(run_dir: Path) -> int:
    """How many steps metrics.jsonl has; 0 without it."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return 0
    everything = TrainState(step=sys.maxsize)
    records = (_known(line, everything) for line in file.read_text(errors="replace").splitlines())
    return len({r["step"] for r in records if r is not None and r.get("phase") in _STEP_PHASES})


def drop_records_after(run_dir: Path, state: TrainState) -> int:
    """Remove lines and weight records that a checkpoint's state does not know of.

    How many of its steps metrics.jsonl does not have comes back.
    """
    metrics = run_dir / "metrics.jsonl"
    steps: set[int] = set()
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [(line, record) for line in lines if (record := _known(line, state)) is not None]
        partial = metrics.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")
        partial.rename(metrics)
        steps = {record["step"] for _, record in kept if record["phase"] in _STEP_PHASES}
    for file in _weight_files(run_dir):
        _, first, last = file.stem.split("_")[:3]
        beyond = int(last) > state.step or int(first) > state.step
        if beyond or _updates_of(file) > state.updates:
            file.unlink()
    return state.step - len(steps)


def _weight_files(run_dir: Path) -> Sequence[Path]:
    return sorted((run_dir / "weights").glob("steps_*.parquet"))


def _updates_of(file: Path) -> int:
    """Updates made when the file was written; one that cannot be read is of no use."""
    try:
        return int((pq.read_schema(file).metadata or {}).get(_UPDATES, b"0"))
    except (OSError, pa.ArrowInvalid):
        return sys.maxsize


def _known(line: str, state: TrainState) -> dict[str, Any] | None:
    """The record of a line, or None if a checkpoint's state does not know of it."""
    try:
        record = json.loads(line)
    except ValueError:  # the process died while it wrote this line
        return None
    if "update" in record:
        return record if record["update"] <= state.updates else None
    limit = state.evaluated_step if record["phase"] == "evaluation" else state.step
    return record if record["step"] <= limit else None
