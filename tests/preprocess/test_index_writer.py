"""Documents of several sequences, in blocks of any size, in Megatron-Core's reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.preprocess.write.index_writer import tokens_of_documents, write_index


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_documents_across_blocks(tmp_path: Path, block: int) -> None:
    generator = np.random.default_rng(5)
    documents = [generator.integers(1, 9, size=n).tolist() for n in generator.integers(0, 5, 60)]
    documents[0], documents[-1] = [], [3, 1, 2]
    entries = [[n if i == 0 else -n for i, n in enumerate(d)] or [0] for d in documents]
    signed_lengths = np.array([length for entry in entries for length in entry], np.int32)
    blocks = [signed_lengths[i : i + block] for i in range(0, len(signed_lengths), block)]
    header = write_index(tmp_path / "p.idx", np.uint16, lambda: iter(blocks))
    (tmp_path / "p.bin").write_bytes(bytes(2 * sum(map(sum, documents))))
    dataset = IndexedDataset(str(tmp_path / "p"))
    borders = np.cumsum([0, *map(len, documents)])
    assert (header.num_documents, header.num_sequences) == (60, borders[-1])
    assert dataset.document_indices.tolist() == borders.tolist()
    assert dataset.sequence_lengths.tolist() == [n for d in documents for n in d]
    assert [len(dataset[i]) for i in range(len(dataset))] == [n for d in documents for n in d]
    totals = np.concatenate(list(tokens_of_documents(blocks)))
    assert totals.tolist() == list(map(sum, documents))
