"""The documents to choose from: their lengths, their domains and the columns of their sidecar.

Reading them costs the `.idx` twice and the columns asked for; memory is 8 bytes a document, and a
byte or two for domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.index_format import read_numbers
from megatron_dwm.files.sidecar_columns import UNKNOWN_DOMAIN, read_codes
from megatron_dwm.preprocess.read.indexed import (
    IndexedInput,
    open_indexed,
    prefix_of,
    signed_lengths,
)
from megatron_dwm.preprocess.write.index_writer import tokens_of_documents
from megatron_dwm.selection.choice import Domains


@dataclass(frozen=True, kw_only=True)
class Pool:
    """An indexed dataset, with its sidecar if it has one."""

    prefix: str
    dataset: IndexedInput
    sidecar: pq.ParquetFile | None

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return self.dataset.header.num_documents

    @cached_property
    def tokens_D(self) -> np.ndarray:
        """int64: tokens of each document."""
        blocks = tokens_of_documents(signed_lengths(self.dataset))
        return np.concatenate([np.zeros(0, np.int64), *blocks])

    def require_sidecar(self, option: str) -> pq.ParquetFile:
        """The sidecar. Raises `UserError` if there is none; `option` is what needs it."""
        if self.sidecar is None:
            raise UserError(
                f"{self.dataset.paths.sidecar}: no such file; {option} reads a column of this "
                f"table, which {name_of_command('preprocess')} writes (--metadata-keys)"
            )
        return self.sidecar

    def require_column(self, name: str, option: str) -> pa.DataType:
        """The type of a column. Raises `UserError`, with the columns there are, if it is missing.

        option: what names or needs the column.
        """
        schema = self.require_sidecar(option).schema_arrow
        if name not in schema.names:
            raise UserError(
                f"{self.dataset.paths.sidecar}: no column {name} ({option}); it has "
                f"{', '.join(schema.names)}"
            )
        return schema.field(name).type

    def domains(self, key: str, option: str | None) -> Domains:
        """The domain of each document, from column `key`.

        Without `option`, which needs the column, all are "unknown" if there is no such column.
        """
        if option is not None:
            self.require_column(key, option)
        if self.sidecar is None or key not in self.sidecar.schema_arrow.names:
            return Domains(
                names=(UNKNOWN_DOMAIN,), codes_D=np.zeros(self.num_documents, dtype=np.uint8)
            )
        names, codes_D = read_codes(self.sidecar, key)
        return Domains(names=names, codes_D=codes_D)


def open_pool(name: str) -> Pool:
    """Open the dataset that a user names. Raises `UserError` if it cannot be used."""
    prefix = prefix_of(name)
    dataset = open_indexed(prefix)
    _require_order(dataset)
    return Pool(prefix=prefix, dataset=dataset, sidecar=_open_sidecar(dataset))


def _require_order(dataset: IndexedInput) -> None:
    """Raise `UserError` unless the sequences lie one after the other, as all tools write them."""
    header, idx = dataset.header, dataset.paths.idx
    end = 0
    with idx.open("rb") as lengths_file, idx.open("rb") as offsets_file:
        lengths = read_numbers(lengths_file, header.lengths_at, np.int32, header.num_sequences)
        offsets = read_numbers(offsets_file, header.offsets_at, np.int64, header.num_sequences)
        for length, offset in zip(lengths, offsets, strict=True):
            ends = end + np.cumsum(length, dtype=np.int64) * header.itemsize
            if offset[0] != end or not np.array_equal(offset[1:], ends[:-1]):
                raise UserError(f"{idx}: its sequences are not one after the other in the .bin")
            end = int(ends[-1])


def _open_sidecar(dataset: IndexedInput) -> pq.ParquetFile | None:
    path = dataset.paths.sidecar
    if not path.exists():
        return None
    try:
        sidecar = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
    if sidecar.metadata.num_rows != dataset.header.num_documents:
        raise UserError(
            f"{path}: {sidecar.metadata.num_rows} rows for {dataset.header.num_documents} "
            "documents; it is damaged"
        )
    return sidecar
