"""The layout of `.idx` files, against Megatron-Core's own writer, and what is no such file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.files.index_format import (
    IndexHeader,
    end_of_tokens_bytes,
    read_header,
    read_numbers,
)
from tests.files.indexed import FIRST_SEQUENCES, LENGTHS, write_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_arrays_stand_where_the_header_says(tmp_path: Path, dtype: type[np.number]) -> None:
    paths = write_dataset(tmp_path / "p", dtype)
    header = read_header(paths.idx)
    assert header == IndexHeader(dtype=dtype, num_sequences=4, num_documents=3)
    assert paths.idx.read_bytes().startswith(header.packed())
    assert end_of_tokens_bytes(paths.idx, header) == paths.bin.stat().st_size
    with paths.idx.open("rb") as file:
        (lengths,) = read_numbers(file, header.lengths_at, np.int32, 4)
        (borders,) = read_numbers(file, header.borders_at, np.int64, 4)
    assert lengths.tolist() == LENGTHS
    assert borders.tolist() == FIRST_SEQUENCES


def test_modes_are_seen(tmp_path: Path) -> None:
    header = read_header(write_dataset(tmp_path / "p", np.int32, multimodal=True).idx)
    assert header.has_modes
    assert header.num_documents == 3


def test_what_is_no_index(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "p", np.int32).idx
    content = path.read_bytes()
    broken = {
        "not a Megatron index": content[:20],
        "type code 9": content[:17] + b"\x09" + content[18:],
        "version 2 ": content[:9] + b"\x02" + content[10:],
        "was cut short": content[:-1],
    }
    for message, damaged in broken.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_header(path)
