"""An indexed dataset that Megatron-Core's own builder writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.files.dataset_paths import DatasetPaths

LENGTHS = [3, 1, 2, 5]
FIRST_SEQUENCES = [0, 1, 1, 4]


def write_dataset(
    prefix: Path, dtype: type[np.number], *, multimodal: bool = False
) -> DatasetPaths:
    """Documents of one, no and three sequences, as Megatron-Core writes them."""
    paths = DatasetPaths.of(str(prefix))
    builder = IndexedDatasetBuilder(str(paths.bin), dtype=dtype, multimodal=multimodal)
    for first, end in zip(FIRST_SEQUENCES, FIRST_SEQUENCES[1:], strict=False):
        for length in LENGTHS[first:end]:
            builder.add_item(torch.arange(length), mode=int(multimodal))
        builder.end_document()
    builder.finalize(str(paths.idx))
    return paths
