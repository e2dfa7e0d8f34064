"""Which prefix sample k comes from, if there are several.

Megatron-Core's greedy blend (`build_blending_indices`, megatron/core/datasets/helpers.cpp): its
choice at k depends only on earlier choices, so a longer blend begins with the shorter one. Without
weights the shares are in proportion to the samples in an epoch. With a schedule they change by step
(greedy_blend.py), and only the choices do: sample j of a prefix is sample j of its stream.
Cost: ten bytes a sample on disk.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers

from megatron_dwm.data.greedy_blend import greedy_blend, number_within
from megatron_dwm.data.index_cache import build_cached, cached
from megatron_dwm.data.shares import Shares


class Blend:
    """The prefixes of `num_samples` samples; `build` comes before all reading."""

    def __init__(self, shares: Shares, num_samples: int, cache: Path) -> None:
        """cache: directory of the index cache."""
        self._shares, self._num_samples, self._cache = shares, num_samples, cache
        self._num_prefixes = shares.shares_SP.shape[1]

    def build(self) -> None:
        """Write the blend if there are several prefixes and it does not exist."""
        if self._num_prefixes > 1:
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
        return np.bincount(self._opened[0], minlength=self._num_prefixes).tolist()

    @cached_property
    def _opened(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The mapped prefixes and positions; None for a single prefix."""
        if self._num_prefixes == 1:
            return None
        folder = cached(self._dir())
        part, position = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("part", "position")
        )
        return part, position

    def _dir(self) -> Path:
        shares, constant = self._shares, self._constant_P
        if constant is not None:
            text = f"{self._num_samples} {[float(share).hex() for share in constant]}"
            return self._cache / f"blend-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        digest = hashlib.sha256(f"{self._num_samples} {shares.shares_SP.shape}".encode())
        digest.update(shares.starts_S.tobytes() + shares.shares_SP.tobytes())
        return self._cache / f"blend-{digest.hexdigest()[:24]}"

    def _write(self, folder: Path) -> None:
        part = np.zeros(self._num_samples, dtype=np.int16)
        position = np.zeros(self._num_samples, dtype=np.int64)
        if self._constant_P is not None:
            helpers.build_blending_indices(
                part, position, self._constant_P, self._num_prefixes, self._num_samples, False
            )
        else:
            part = greedy_blend(self._shares, self._num_samples)
            number_within(part, self._num_prefixes, position)
        np.save(folder / "part.npy", part)
        np.save(folder / "position.npy", position)

    @property
    def _constant_P(self) -> np.ndarray | None:
        """The shares if they never change and none is 0, as Megatron has them; else None."""
        [first_P, *others] = self._shares.shares_SP
        return None if others or not first_P.all() else first_P
