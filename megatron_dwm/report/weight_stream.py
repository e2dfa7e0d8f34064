"""Reads `weights/*.parquet` in batches of bounded memory, for runs with very many weights.

A run that was killed after a step and resumed before it has written the step twice; the last file
counts. That needs all rows of such steps at once, and of no others: their number is what lies
between two checkpoints. So a pass reads the steps of every file first, and gives the rows of steps
that several files have at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError

BATCH_ROWS = 1 << 17
_TYPES = {
    "step": pa.int64(),
    "stage": pa.int64(),
    "source": pa.string(),
    "sample_id": pa.int64(),
    "document_id": pa.int64(),
    "domain": pa.string(),
    "tokens": pa.int64(),
    "loss": pa.float32(),
    "weight": pa.float32(),
    "alignment": pa.float32(),
}
_KEYS = ("step", "source", "sample_id")
_NAMES = ("domain", "source")
_NEEDED = ("step", "sample_id", "weight")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files of a run's weights.

    steps: all steps with weights, sorted.
    twice: steps that several files have, sorted.
    """

    paths: Sequence[Path]
    steps: np.ndarray
    twice: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0


def weight_files(run_dir: Path) -> WeightFiles:
    """Returns the files of a run's weights; there may be none.

    Raises `UserError` if a file is broken.
    """
    paths = sorted((run_dir / "weights").glob("*.parquet"))
    found = [_steps_of(path) for path in paths]
    steps, files = np.unique(np.concatenate([*found, np.empty(0, np.int64)]), return_counts=True)
    return WeightFiles(paths=paths, steps=steps, twice=steps[files > 1])


def _steps_of(path: Path) -> np.ndarray:
    parts = [np.unique(batch["step"].to_numpy()) for batch in _batches(path, ["step"])]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def stream(files: WeightFiles, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Gives all weights of a run once, in batches; their order is not that of the steps.

    Columns have the types of docs/metrics.md, and `domain` and `source` are dictionary-encoded. A
    column that a file lacks is null there. Raises `UserError` if a file is broken.
    """
    asked = list(dict.fromkeys((*_KEYS, *columns)))
    held, number_of = [], []
    for number, path in enumerate(files.paths):
        names = asked if len(files.twice) else list(columns)
        for batch in _batches(path, names):
            if not len(files.twice):
                yield batch
                continue
            again = np.isin(batch["step"].to_numpy(), files.twice)
            if again.any():
                held.append(batch.filter(pa.array(again)))
                number_of.append(np.full(int(again.sum()), number))
            if not again.all():
                yield batch.filter(pa.array(~again)).select(list(columns))
    if held:
        rows = pa.concat_tables(held).unify_dictionaries()
        kept = _last_written(rows, np.concatenate(number_of))
        yield rows.take(pa.array(kept)).select(list(columns))


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    try:
        there = set(pq.read_schema(path).names)
        if missing := [name for name in _NEEDED if name not in there]:
            raise KeyError(f"no column {missing[0]}")
        names = [name for name in columns if name in there]
        guess = "source" in columns and "source" not in there
        if guess and "alignment" in there and "alignment" not in names:
            names.append("alignment")
        file = pq.ParquetFile(path, read_dictionary=[n for n in _NAMES if n in there])
        for batch in file.iter_batches(BATCH_ROWS, columns=names or ["step"]):
            typed = _typed(pa.table(batch), columns)
            if "step" in columns and typed["step"].null_count:
                raise UserError(
                    f"{path} has a row without a step, expected the number of one in every row; "
                    "move the file out of the folder"
                )
            yield typed
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _broken_file(path, error) from error


def _typed(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    arrays = {}
    for name in columns:
        kind = _TYPES[name]
        if name in table.column_names:
            column = table[name]
        elif name == "source" and "alignment" in table.column_names:
            column = _guessed_source(table["alignment"])
        else:
            column = pa.chunked_array([pa.nulls(len(table), kind)])
        encoded = kind == pa.string()
        if encoded and not pa.types.is_dictionary(column.type):
            column = column.cast(kind).dictionary_encode()
        arrays[name] = column.unify_dictionaries() if encoded else column.cast(kind)
    return pa.table(arrays)


def trained_on(table: pa.Table) -> np.ndarray:
    """Returns True for the rows of samples that the LLM trained on, not of an update's own."""
    return pc.fill_null(pc.not_equal(table["source"].cast(pa.string()), "update"), True).to_numpy()


def codes(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """Returns for each row the number of its name in `known`, to which new names are added."""
    parts = [_codes(chunk, known) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _codes(chunk: pa.DictionaryArray, known: dict[str, int]) -> np.ndarray:
    names = [str(name) for name in chunk.dictionary.to_pylist()]
    number = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
    missing = known.setdefault("unknown", len(known)) if chunk.null_count else 0
    indices = chunk.indices.to_numpy(zero_copy_only=False)
    if not chunk.null_count:
        return number[indices]
    valid = ~np.isnan(indices)
    found = np.full(len(indices), missing)
    found[valid] = number[indices[valid].astype(np.int64)]
    return found


def _last_written(rows: pa.Table, file: np.ndarray) -> np.ndarray:
    """Returns row numbers in the order of (step, source, sample), without superseded rows.

    If several files have the same sample of a step, the last file counts. No file has a step twice,
    so equal ids within one file are a passage that its batch has twice.
    """
    step, sample = rows["step"].to_numpy(), rows["sample_id"].to_numpy()
    _, source = _encode(rows["source"])
    order = np.lexsort((file, sample, source, step))
    differs = [np.diff(column[order]) != 0 for column in (step, source, sample)]
    ends = np.append(np.logical_or.reduce(differs), True)
    last_file = file[order][ends]
    number_of_sample = np.cumsum(ends) - ends
    return order[file[order] == last_file[number_of_sample]]


def _encode(column: pa.ChunkedArray) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the sorted names, and for each row the index of its name."""
    encoded = column.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = tuple(sorted(found))
    index_of = np.array([names.index(name) for name in found])
    return names, index_of[encoded.indices.to_numpy()]


def _broken_file(path: Path, error: Exception) -> UserError:
    """Returns the error of a file that cannot be read as weights."""
    reason = str(error).splitlines()[0]
    return UserError(f"{path} has no weights of a run ({reason}); move it out of the folder")


def _guessed_source(alignment: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the source column for files of older versions: `update` for rows with an alignment.

    That is wrong for updates on the training batch, but their steps have no other record.
    """
    return pc.if_else(alignment.is_null(), "training", "update")
