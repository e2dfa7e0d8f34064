"""Merging takes every type that an `.idx` may have, and no multimodal dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.merge import merge_datasets
from tests.files.indexed import LENGTHS, write_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_type_is_merged(tmp_path: Path, dtype: type[np.number]) -> None:
    prefixes = [str(tmp_path / name) for name in "ab"]
    for prefix in prefixes:
        write_dataset(Path(prefix), dtype)
    summary = merge_datasets(prefixes, str(tmp_path / "merged"))
    assert (summary.documents, summary.tokens) == (6, 2 * sum(LENGTHS))
    merged = IndexedDataset(str(tmp_path / "merged"))
    assert merged.index.dtype is dtype
    assert [row.tolist() for row in merged[:8]] == 2 * [list(range(n)) for n in LENGTHS]


def test_multimodal_datasets_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_dataset(tmp_path / name, np.int32, multimodal=True)
    with pytest.raises(UserError, match="a.idx: multimodal"):
        merge_datasets([str(tmp_path / name) for name in "ab"], str(tmp_path / "merged"))


def test_one_corpus_divided_twice_is_refused(tmp_path: Path) -> None:
    """A pattern such as sp-* has the shards of an earlier division, too."""
    names = [f"{tmp_path}/sp-{i:05d}-of-{n:05d}_text" for n in (1, 2) for i in range(n)]
    with pytest.raises(UserError, match="the same corpus, divided twice"):
        merge_datasets(names, str(tmp_path / "out"))
