"""Token ids into Megatron's `.bin` and `.idx`, through Megatron-Core's own builder.

A document without tokens is what Megatron-LM's tool makes of it: no sequence, but an entry of its
own among the document boundaries of the `.idx`. The builder keeps a length and a boundary for each
document in memory until the end.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


@dataclass(kw_only=True)
class DatasetCounts:
    """Running totals of one dataset."""

    documents: int = 0
    """documents with tokens"""
    empty: int = 0
    """documents without"""
    tokens: int = 0
    """ids written, ends of document included"""


class IndexedWriter:
    """Writes one dataset; `finish` completes it, `close` gives it up."""

    def __init__(self, bin_path: Path, dtype: type[np.number]) -> None:
        self._bin_path = bin_path
        self._dtype = dtype
        self._builder: IndexedDatasetBuilder | None = None
        self.counts = DatasetCounts()

    def add(self, ids: np.ndarray) -> None:
        """Append one document."""
        if self._builder is None:
            self._builder = _builder(self._bin_path, self._dtype)
        lengths = [len(ids)] if len(ids) else []
        self._builder.add_document(ids, lengths)
        self.counts.documents += len(lengths)
        self.counts.empty += 1 - len(lengths)
        self.counts.tokens += len(ids)

    def finish(self, idx_path: Path) -> None:
        """Close the `.bin` and write the `.idx`."""
        assert self._builder is not None, "a dataset without documents is refused before"
        self._builder.finalize(str(idx_path))

    def close(self) -> None:
        """Close the `.bin`, finished or not."""
        if self._builder is not None:
            self._builder.data_file.close()


def _builder(bin_path: Path, dtype: type[np.number]) -> IndexedDatasetBuilder:
    """Megatron-Core's builder, imported with the first document.

    The import brings torch and takes seconds: neither --help, nor a worker, nor an input whose
    first record is broken should wait for it.
    """
    with warnings.catch_warnings():
        # It speaks of Transformer Engine and apex, which tokenizing never needs.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder(str(bin_path), dtype=dtype)
