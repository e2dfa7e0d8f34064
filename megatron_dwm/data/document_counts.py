"""How many documents a sample packs, and how far attention inside them reaches, from the index.

A window of S tokens begins anywhere in the text, so a document of L tokens is cut 1 + (L - 1) / S
times on average into pieces. The expected sum of the pieces' squared lengths is the sum over the
distances d of (L - |d|) (1 - |d| / S), the pairs of tokens in one window:

    L^2 - (L^3 - L) / (3 S)   for L <= S,      L S - (S^2 - 1) / 3   for L > S.

Cost: one read of the lengths of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config import Config
from megatron_dwm.config.blend import parse_blend
from megatron_dwm.data.prefixes import IndexedFile, read_indexed_file
from megatron_dwm.data.shares import shares_of_run


@dataclass(frozen=True, kw_only=True)
class DocumentCounts:
    """Means over what the run reads of the training data.

    units_per_row: units in a sample.
    attended_tokens: the length of whole rows with the same attention FLOPs a token; None if
        attention has no borders.
    """

    units_per_row: float = 1.0
    attended_tokens: float | None = None


WHOLE_ROWS = DocumentCounts()
"""rows are units, and attention has no borders"""


def document_counts(config: Config) -> DocumentCounts:
    """Returns the means of a run's data, or `WHOLE_ROWS` without a look if it ignores documents.

    Raises UserError if a file is missing or cannot be used.
    """
    are_units = config.weighting.unit == "document"
    if not are_units and not config.masks_documents:
        return WHOLE_ROWS
    parts = parse_blend(config.data.train)
    files = [read_indexed_file(part.prefix) for part in parts]
    means = [_means(file, config.data.sequence_length) for file in files]
    tokens = [file.num_tokens for file in files]
    shares = shares_of_run(config.data, parts, tokens, config.training.steps)
    pieces, attended = np.average(means, axis=0, weights=shares)
    return DocumentCounts(
        units_per_row=float(pieces) if are_units else 1.0,
        attended_tokens=float(attended) if config.masks_documents else None,
    )


def document_lengths(file: IndexedFile) -> np.ndarray:
    """Returns int64, the tokens of every document; 0 for an empty one."""
    indexed = IndexedDataset(file.prefix, mmap=True)
    ends = np.concatenate([[0], np.cumsum(indexed.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[indexed.document_indices])


def _means(file: IndexedFile, sequence_length: int) -> tuple[float, float]:
    """Returns the pieces in a row, and the mean over tokens of the length of their piece."""
    lengths = document_lengths(file).astype(np.float64)
    lengths = lengths[lengths > 0]
    size, tokens = float(sequence_length), lengths.sum()
    pieces = (1.0 + (lengths - 1.0) / size).sum() / tokens * size
    squares = np.where(
        lengths <= size,
        lengths**2 - (lengths**3 - lengths) / (3.0 * size),
        lengths * size - (size**2 - 1.0) / 3.0,
    )
    return pieces, squares.sum() / tokens
