"""Records of a run in Parquet files, one for every interval between two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.data import Origins
from megatron_dwm.files.atomic import new_file
from megatron_dwm.run.recorded import UPDATES

ORIGIN_FIELDS: list[tuple[str, pa.DataType]] = [
    ("step", pa.int64()),
    ("stage", pa.int32()),
    ("source", pa.dictionary(pa.int32(), pa.string())),
    ("sample_id", pa.int64()),
    ("document_id", pa.int64()),
    ("domain", pa.dictionary(pa.int32(), pa.string())),
]
"""the first columns of every record: when a row was weighed, and where it comes from

source: what sample_id and document_id number, since three numberings start from 0: samples that the
    LLM trains on (training), samples that a fresh weighting update drew (update), passages of the
    target that are mixed into the batch (target)
"""


def origin_columns(step: int, stage: int, origins: Origins) -> list[list[Any]]:
    """Returns the columns of `ORIGIN_FIELDS`."""
    rows = len(origins.domains)
    return [
        [step] * rows,
        [stage] * rows,
        list(origins.numberings),
        origins.sample_ids_U.tolist(),
        origins.document_ids_U.tolist(),
        list(origins.domains),
    ]


class ParquetRecords:
    """Collects the rows of steps and writes them to `steps_FIRST_LAST.parquet` in one folder."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        self._tables: list[pa.Table] = []
        self._steps: list[int] = []

    def keep(self, step: int, columns: Sequence[Sequence[Any]]) -> None:
        """Keep rows of a step, given as the schema's columns."""
        arrays = [
            pa.array(column, type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._tables.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._steps.append(step)

    def forget(self) -> None:
        """Drop the rows that were not written yet."""
        self._tables, self._steps = [], []

    def flush(self, updates: int) -> None:
        """Write the rows since the last call as one file, whose metadata has `updates`.

        Raises OSError if writing fails; the rows are then still kept.
        """
        if not self._tables:
            return
        self._folder.mkdir(exist_ok=True)
        name = f"steps_{self._steps[0]:08d}_{self._steps[-1]:08d}.parquet"
        table = pa.concat_tables(self._tables).unify_dictionaries()
        with new_file(self._folder / _free_name(self._folder, name)) as partial:
            pq.write_table(table.replace_schema_metadata({UPDATES: str(updates)}), partial)
        self.forget()


def _free_name(directory: Path, name: str) -> str:
    """Returns `name`, or `name` with a number if a file with this name exists."""
    stem = name.removesuffix(".parquet")
    names = [name, *(f"{stem}_{number}.parquet" for number in range(1, 1000))]
    return next(candidate for candidate in names if not (directory / candidate).exists())
