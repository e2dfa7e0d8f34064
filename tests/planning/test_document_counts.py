"""Pieces in a window and the reach of attention inside them, against every window of a corpus."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.config import Config, DataConfig, WeightingConfig
from megatron_dwm.data.document_counts import document_counts

LENGTH = 16


def _write(prefix: Path, lengths: np.ndarray) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        builder.add_document(torch.arange(length), [int(length)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _in_windows(lengths: np.ndarray) -> tuple[float, float]:
    """Pieces in a window, and the mean over its tokens of the length of their piece.

    Over the windows from every token, on a circle, on which each beginning is as likely.
    """
    owners = np.repeat(np.arange(len(lengths)), lengths)
    circle = np.concatenate([owners, owners[:LENGTH]])
    windows = [circle[begin : begin + LENGTH] for begin in range(len(owners))]
    pieces = [[len(list(piece)) for _, piece in groupby(window)] for window in windows]
    count = float(np.mean([len(each) for each in pieces]))
    return count, float(np.mean([np.square(each).sum() / LENGTH for each in pieces]))


@pytest.mark.parametrize("longest", [LENGTH // 2, 3 * LENGTH])
def test_means_are_those_of_all_windows(tmp_path: Path, longest: int) -> None:
    lengths = np.random.default_rng(longest).integers(1, longest + 1, size=300)
    data = DataConfig(
        train=[_write(tmp_path / "d", lengths)], sequence_length=LENGTH, mask_documents=True
    )
    found = document_counts(Config(data=data, weighting=WeightingConfig(unit="document")))
    pieces, reach = _in_windows(lengths)
    assert found.units_per_row == pytest.approx(pieces, rel=1e-6)
    assert found.attended_tokens == pytest.approx(reach, rel=1e-6) and reach < LENGTH
