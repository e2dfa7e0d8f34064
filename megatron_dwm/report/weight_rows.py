"""Streams the rows of `weights/*.parquet`, so that a run of any length fits in memory.

A file that cannot be read, or that has no weights, is left out and noted. Columns that a file lacks
are filled: older versions wrote fewer. If a step is in several files (a run that was resumed while
another start of it still wrote), the last file that has a sample counts.

Memory: one batch of rows, the distinct steps of every file, and the samples of steps that several
files have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SOURCES = ("training", "update", "target")
"""what a row's ids number, by the code in `WeightRows.source_R`"""
TRAINING, UPDATE, TARGET = range(3)
UNKNOWN = -1
"""document of a row whose file has no such column"""
ROWS_IN_BATCH = 1 << 17
_KEYS = ("step", "source", "sample_id")
_NUMBERS = {
    **{"step": np.int64, "stage": np.int64, "sample_id": np.int64, "document_id": np.int64},
    **{"tokens": np.float64, "loss": np.float64, "weight": np.float64, "alignment": np.float64},
}
_MISSING = {"step": 0, "stage": 1, "document_id": UNKNOWN, "sample_id": UNKNOWN, "tokens": 1.0}


@dataclass(frozen=True, kw_only=True)
class WeightRows:
    """R recorded weights, in the order of their file."""

    step_R: np.ndarray
    stage_R: np.ndarray
    source_R: np.ndarray
    """int8, an index into `SOURCES`"""
    document_R: np.ndarray
    domain_R: np.ndarray
    """int32, an index into `WeightFiles.domains`"""
    tokens_R: np.ndarray
    loss_R: np.ndarray
    """NaN where it is not recorded, as in `alignment_R`"""
    weight_R: np.ndarray
    alignment_R: np.ndarray

    def where(self, chosen_R: np.ndarray) -> WeightRows:
        """The chosen rows."""
        return WeightRows(**{name: values[chosen_R] for name, values in vars(self).items()})

    @property
    def of_corpus_R(self) -> np.ndarray:
        """True for rows whose document is one of the training data, and known."""
        return (self.source_R != TARGET) & (self.document_R >= 0)


@dataclass(kw_only=True)
class WeightFiles:
    """The readable files of a run's weights, and the names of the domains that were read so far."""

    paths: Sequence[Path]
    notes: Sequence[str]
    """a line for each file that was left out"""
    _codes: dict[str, int] = field(default_factory=dict)
    _contested: _Contested | None = None

    @staticmethod
    def open(run_dir: Path) -> WeightFiles:
        """Find the files of a run; there may be none."""
        found, notes = [], []
        for path in sorted((run_dir / "weights").glob("*.parquet")):
            trouble = _trouble(path)
            if trouble is None:
                found.append(path)
            else:
                notes.append(f"{path.name} is left out: {trouble}")
        return WeightFiles(paths=found, notes=notes)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, by their code."""
        return tuple(self._codes)

    @property
    def num_rows(self) -> int:
        """Rows of all files, superseded ones included."""
        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def batches(self) -> Iterator[WeightRows]:
        """Read all rows that count, some at a time."""
        contested = self._contested = self._contested or _Contested.of(self.paths)
        for number, path in enumerate(self.paths):
            for table in _tables(path, tuple(_NUMBERS) + ("source", "domain")):
                kept = contested.kept(number, table)
                rows = self._rows(table)
                yield rows if kept is None else rows.where(kept)

    def _rows(self, table: pa.Table) -> WeightRows:
        numbers = {name: _numbers(table, name) for name in _NUMBERS}
        return WeightRows(
            step_R=numbers["step"],
            stage_R=numbers["stage"],
            source_R=_sources(table),
            document_R=numbers["document_id"],
            domain_R=self._domains(table),
            tokens_R=numbers["tokens"],
            loss_R=numbers["loss"],
            weight_R=numbers["weight"],
            alignment_R=numbers["alignment"],
        )

    def _domains(self, table: pa.Table) -> np.ndarray:
        if "domain" not in table.column_names:
            return np.full(len(table), self._codes.setdefault("unknown", len(self._codes)))
        column = pc.fill_null(pc.cast(table["domain"], pa.string()), "unknown")
        encoded = column.combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        codes = [self._codes.setdefault(name, len(self._codes)) for name in names]
        return np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]


@dataclass(frozen=True)
class _Contested:
    """Steps that several files have, and the last file that has each of their samples.

    A sample is known by a hash of its step, source and number: of ten million, two agree with a
    probability of 3e-6.
    """

    steps: np.ndarray
    hash_M: np.ndarray
    """uint64, sorted"""
    last_file_M: np.ndarray

    @staticmethod
    def of(paths: Sequence[Path]) -> _Contested:
        """Compare the steps of all files."""
        by_file = [_distinct_steps(path) for path in paths]
        steps, counts = np.unique(np.concatenate([[], *by_file]), return_counts=True)
        contested = steps[counts > 1].astype(np.int64)
        hashes, files = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        for number, path in enumerate(paths):
            if np.isin(by_file[number], contested).any():
                for table in _tables(path, (*_KEYS, "alignment")):
                    hashes.append(np.unique(_hashes(table)[np.isin(_steps(table), contested)]))
                    files.append(np.full(len(hashes[-1]), number, np.int32))
        every, file = np.concatenate(hashes), np.concatenate(files)
        order = np.lexsort((file, every))
        is_last = np.diff(every[order], append=np.uint64(0)) != 0
        if len(order):
            is_last[-1] = True
        return _Contested(contested, every[order][is_last], file[order][is_last])

    def kept(self, number: int, table: pa.Table) -> np.ndarray | None:
        """True for rows of file `number` that no later file has; None for all."""
        if not len(self.steps) or not (shared := np.isin(_steps(table), self.steps)).any():
            return None
        found = np.searchsorted(self.hash_M, _hashes(table)[shared])
        shared[shared] = self.last_file_M[found] != number
        return ~shared


def _trouble(path: Path) -> str | None:
    """Returns why a file has no weights of a run; None if it has."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        return f"it cannot be read ({str(error).splitlines()[0]})"
    missing = [name for name in ("step", "weight") if name not in schema.names]
    return f"it has no column {missing[0]}" if missing else None


def _tables(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path)
    known = [name for name in columns if name in file.schema_arrow.names]
    for batch in file.iter_batches(ROWS_IN_BATCH, columns=known):
        yield pa.Table.from_batches([batch])


def _distinct_steps(path: Path) -> np.ndarray:
    found = [np.unique(_numbers(table, "step")) for table in _tables(path, ("step",))]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def _steps(table: pa.Table) -> np.ndarray:
    return _numbers(table, "step")


def _hashes(table: pa.Table) -> np.ndarray:
    """Returns uint64 [R], a hash of step, source and sample of each row (splitmix64's mixing)."""
    hashed = np.zeros(len(table), np.uint64)
    for column in (_steps(table), _sources(table), _numbers(table, "sample_id")):
        hashed += column.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed ^= hashed >> np.uint64(31)
    return hashed


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    missing = _MISSING.get(name, np.nan)
    if name not in table.column_names:
        return np.full(len(table), missing, dtype=_NUMBERS[name])
    column = pc.fill_null(pc.cast(table[name], pa.from_numpy_dtype(_NUMBERS[name])), missing)
    return column.to_numpy()


def _sources(table: pa.Table) -> np.ndarray:
    """Returns the codes of the rows' sources.

    Files of older versions do not have them: a row with an alignment is then one of an update.
    """
    if "source" not in table.column_names:
        return np.where(np.isnan(_numbers(table, "alignment")), TRAINING, UPDATE).astype(np.int8)
    encoded = pc.cast(table["source"], pa.string()).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = [SOURCES.index(name) if name in SOURCES else TRAINING for name in names]
    return np.array(codes, dtype=np.int8)[encoded.indices.to_numpy()]
