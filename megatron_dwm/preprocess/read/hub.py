"""`hf://DATASET[:split]`: a data set of the Hugging Face hub, streamed by the `datasets` library.

The only file that imports datasets. DATASET is a name on the hub or a local directory that the
library can load. Nothing is copied to disk beyond the library's own metadata; resuming skips the
rows that are done, which for a streamed data set means reading them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.read.tables import TableRows, table_chunks
from megatron_dwm.preprocess.records import Chunk, Position

if TYPE_CHECKING:
    from datasets import IterableDataset

HUB_PREFIX = "hf://"
_ROWS = 256


def split_name(name: str) -> tuple[str, str]:
    """Split `hf://DATASET[:split]` into data set and split; "train" if none is named."""
    dataset, _, split = name.removeprefix(HUB_PREFIX).partition(":")
    return dataset, split or "train"


def read_hub(
    name: str, start: Position, *, columns: Sequence[str], chunk_bytes: int
) -> Iterator[Chunk]:
    """Chunks of the rows of data set `name` from row `start.offset` on.

    Raises `UserError` if it cannot be opened.
    """
    dataset = _open(name)
    known = dataset.column_names
    if known is not None:
        wanted = [column for column in columns if column in known]
        dataset = dataset.select_columns(wanted) if wanted else dataset

    if start.offset:
        dataset = dataset.skip(start.offset)

    def tables() -> Iterator[pa.Table]:
        yield from dataset.with_format("arrow").iter(batch_size=_ROWS)

    # The number of rows is not known before the end; progress shows documents only.
    rows = TableRows(tables=tables(), total_rows=1)
    yield from table_chunks(rows, name, start, size_bytes=0, chunk_bytes=chunk_bytes)


def _open(name: str) -> IterableDataset:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from datasets import load_dataset

    dataset, split = split_name(name)
    try:
        return load_dataset(dataset, split=split, streaming=True)
    # The library raises errors of many kinds, of its own and of its network clients.
    except Exception as error:
        complaint = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the data set cannot be opened ({type(error).__name__}: {complaint}); "
            "expected hf://DATASET[:split]"
        ) from None
