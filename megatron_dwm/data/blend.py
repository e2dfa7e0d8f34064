"""Which prefix sample k comes from, if there are several.

Megatron-Core's greedy blend (`build_blending_indices`, megatron/core/datasets/helpers.cpp): its
choice at k depends only on earlier choices, so a longer blend begins with the shorter one. Without
weights the shares are in proportion to the samples in an epoch. Cost: ten bytes a sample on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers

from megatron_dwm.data.index_cache import build_cached, cached
from megatron_dwm.data.prefixes import BlendPart


class Blend:
    """The prefixes of `num_samples` samples; `build` comes before all reading."""

    def __init__(
        self, parts: Sequence[BlendPart], per_epoch: Sequence[int], num_samples: int, cache: Path
    ) -> None:
        """per_epoch: samples of every prefix in an epoch. cache: directory of the index cache."""
        self._parts, self._num_samples, self._cache = parts, num_samples, cache
        self._shares = _shares(parts, per_epoch)

    def build(self) -> None:
        """Write the blend if there are several prefixes and it does not exist."""
        if len(self._parts) > 1:
            build_cached(self._dir(), self._write)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Returns a sample's prefix, and its position in the stream of that prefix."""
        if self._opened is None:
            return 0, sample_id
        part, position = self._opened
        return int(part[sample_id]), int(position[sample_id])

    def samples_by_prefix(self) -> list[int]:
        """Returns the number of samples from every prefix."""
        if self._opened is None:
            return [self._num_samples]
        return np.bincount(self._opened[0], minlength=len(self._parts)).tolist()

    @cached_property
    def _opened(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The mapped prefixes and positions; None for a single prefix."""
        if len(self._parts) == 1:
            return None
        folder = cached(self._dir())
        part, position = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("part", "position")
        )
        return part, position

    def _dir(self) -> Path:
        text = f"{self._num_samples} {[float(share).hex() for share in self._shares]}"
        return self._cache / f"blend-{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    def _write(self, folder: Path) -> None:
        part = np.zeros(self._num_samples, dtype=np.int16)
        position = np.zeros(self._num_samples, dtype=np.int64)
        helpers.build_blending_indices(
            part, position, self._shares, len(self._shares), self._num_samples, False
        )
        np.save(folder / "part.npy", part)
        np.save(folder / "position.npy", position)


def _shares(parts: Sequence[BlendPart], per_epoch: Sequence[int]) -> np.ndarray:
    """Returns the shares of the prefixes, float64, with sum 1."""
    raw = [
        count if part.weight is None else part.weight
        for part, count in zip(parts, per_epoch, strict=True)
    ]
    weights = np.array(raw, dtype=np.float64)
    return weights / weights.sum()
