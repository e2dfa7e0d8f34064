"""Columns of a sidecar as arrays of one value a document.

One row group is in memory, and the result: names of domains as small integers.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

UNKNOWN_DOMAIN = "unknown"
"""the domain of a document whose value is null or empty"""


def read_codes(sidecar: pq.ParquetFile, column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct values of `column` as text, and for each row its index among them.

    A null or empty value counts as `UNKNOWN_DOMAIN`.
    """
    codes_by_name: dict[str, int] = {}
    codes = np.empty(sidecar.metadata.num_rows, dtype=np.int32)
    row = 0
    for group in range(sidecar.num_row_groups):
        values = sidecar.read_row_group(group, columns=[column]).column(0)
        group_codes = _encode(values, codes_by_name)
        codes[row : row + len(group_codes)] = group_codes
        row += len(group_codes)
    names = tuple(codes_by_name)
    return names, codes.astype(np.min_scalar_type(len(names)))


def _encode(column: pa.ChunkedArray, codes_by_name: dict[str, int]) -> np.ndarray:
    """Returns the codes of the column's values, and adds new names to `codes_by_name`."""
    text = pc.fill_null(pc.cast(column, pa.string()), UNKNOWN_DOMAIN).combine_chunks()
    encoded = text.dictionary_encode()
    lookup = np.array(
        [
            codes_by_name.setdefault(name or UNKNOWN_DOMAIN, len(codes_by_name))
            for name in encoded.dictionary.to_pylist()
        ],
        dtype=np.int32,
    )
    return lookup[encoded.indices.to_numpy(zero_copy_only=False)]
