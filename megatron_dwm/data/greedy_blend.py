"""The greedy blend with shares that change: the prefix of every sample, in a vectorized way.

Megatron-Core's rule (`build_blending_indices`, megatron/core/datasets/helpers.cpp), with the sum of
the shares of the first k samples where it has k times the share: sample k is of the prefix with

    the largest  W_p(k) - c_p(k)        W_p: sum of its shares, c_p: samples of it before k

the first of equals, and W_p(1) for k = 0. A prefix whose share is 0 at sample k is not chosen.

With P prefixes of shares above 0, c_p is at most 1 above W_p and at most 1 + 1/2 + ... + 1/(P - 1)
below it, whatever the shares do. Above: the chosen deficit is at least the mean, which is 0. Below:
let B_j be the largest sum of j deficits at any time. If one of the j loses 1, their sum does not
rise, since shares are 1 in all. If not, the largest deficit is outside of them and at least their
mean, so their sum was at most j / (j + 1) of B_(j+1). So B_j <= 1 + B_(j+1) j / (j + 1); B_P is 0.
A prefix without a share keeps its deficit, and the others have the opposite among them.

Each choice depends on the last one, but wrong counts are soon forgotten: after some samples of each
prefix the choices are the same. So the chunks of a block are computed side by side, from guessed
counts. Chunks that began with other counts than the chunk before ended with are computed again,
until all fit, which is exact. Under shares below about 0.0001 chunks forget slowly; what is left
after a few rounds is computed one sample after the other.

Cost: 0.1 to 0.2 microseconds of CPU time a sample (docs/blends.md has the command), and 100 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_dwm.data.shares import Shares

_CHUNK = 1024
_BLOCK = 1 << 21
_ROUNDS = 4
_AT_ONCE = 32


def greedy_blend(shares: Shares, num_samples: int) -> np.ndarray:
    """Returns int16 [num_samples], the number of the prefix of every sample."""
    chosen = np.empty(num_samples, dtype=np.int16)
    counts_P = np.zeros(shares.shares_SP.shape[1], dtype=np.int64)
    for start, stop in _blocks(shares, num_samples):
        active_A = np.flatnonzero(shares.at(np.array([start]))[0])
        block = _Block(shares, start, stop, active_A)
        chosen[start:stop] = active_A[block.choose(counts_P)]
        counts_P += np.bincount(chosen[start:stop], minlength=len(counts_P))
    return chosen


def number_within(chosen: np.ndarray, num_prefixes: int, numbers: np.ndarray) -> None:
    """Write to `numbers` for each sample how many of its prefix come before it."""
    counts_P = np.zeros(num_prefixes, dtype=np.int64)
    for start in range(0, len(chosen), _BLOCK):
        of_block = chosen[start : start + _BLOCK]
        for prefix in range(num_prefixes):
            places = np.flatnonzero(of_block == prefix)
            numbers[start + places] = counts_P[prefix] + np.arange(len(places))
            counts_P[prefix] += len(places)


def _blocks(shares: Shares, num_samples: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of samples in each of which the same prefixes have a share above 0."""
    positive = shares.shares_SP > 0
    changes = 1 + np.flatnonzero(np.any(positive[1:] != positive[:-1], axis=1))
    borders = [0, *shares.starts_S[changes].tolist(), num_samples]
    for start, stop in zip(borders, borders[1:], strict=False):
        for first in range(start, min(stop, num_samples), _BLOCK):
            yield first, min(first + _BLOCK, stop, num_samples)


@dataclass(frozen=True)
class _Block:
    """Samples `start` to `stop - 1`, of A prefixes `active_A`, in M chunks of C samples."""

    shares: Shares
    start: int
    stop: int
    active_A: np.ndarray

    @property
    def _chunk(self) -> int:
        return min(_CHUNK, self.stop - self.start)

    def choose(self, counts_P: np.ndarray) -> np.ndarray:
        """Returns the place in `active_A` of every sample. counts_P: samples before the block."""
        starts_M = np.arange(self.start, self.stop, self._chunk)
        counts_MA = self._guess(starts_M, counts_P)
        ends_MA = np.empty_like(counts_MA)
        chosen_MC = np.empty((len(starts_M), self._chunk), dtype=np.int16)
        todo = np.arange(len(starts_M))
        for number in range(_ROUNDS):
            if number:
                counts_MA[todo] = ends_MA[todo - 1]
            chosen_MC[todo], ends_MA[todo] = self._side_by_side(starts_M[todo], counts_MA[todo])
            todo = 1 + np.flatnonzero(np.any(counts_MA[1:] != ends_MA[:-1], axis=1))
            if not len(todo):
                break
        # If some are left, each may change all that come after it.
        for chunk in range(todo[0] if len(todo) else len(starts_M), len(starts_M)):
            before_A = ends_MA[chunk - 1]
            if np.any(counts_MA[chunk] != before_A):
                chosen_MC[chunk], ends_MA[chunk] = self._in_order(starts_M[chunk], before_A)
        return chosen_MC.reshape(-1)[: self.stop - self.start]

    def _guess(self, starts_M: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
        """Returns float64 [M, A], counts before each chunk; those of the first are exact."""
        counts_A = counts_P[self.active_A]
        others = counts_P.sum() - counts_A.sum()
        sums_MA = self.shares.before(starts_M)[:, self.active_A]
        excess_M = sums_MA.sum(axis=1) - (starts_M - others)
        wanted_MA = sums_MA - excess_M[:, None] / len(self.active_A)
        guess_MA = np.floor(wanted_MA)
        missing_M = starts_M - others - guess_MA.sum(axis=1)
        # The largest remainders are rounded up.
        ranks_MA = np.argsort(np.argsort(guess_MA - wanted_MA, axis=1), axis=1)
        guess_MA += ranks_MA < missing_M[:, None]
        guess_MA[0] = counts_A
        return guess_MA

    def _side_by_side(
        self, starts_M: np.ndarray, counts_MA: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the choices [M, C] in chunks, and the counts [M, A] after them."""
        counts_AM, chunks = counts_MA.T.copy(), np.arange(len(starts_M))
        chosen_CM = np.empty((self._chunk, len(starts_M)), dtype=np.int16)
        for first in range(0, self._chunk, _AT_ONCE):
            samples = starts_M + np.arange(first, first + _AT_ONCE)[:, None]
            for row, sums_AM in zip(chosen_CM[first:], self._sums(samples), strict=False):
                row[:] = _first_largest(sums_AM - counts_AM)
                counts_AM[row, chunks] += 1.0
        return chosen_CM.T, counts_AM.T

    def _in_order(self, start: int, counts_A: np.ndarray) -> tuple[list[int], list[float]]:
        """Returns the choices in one chunk, and the counts after it."""
        counts, chosen = counts_A.tolist(), []
        [sums_AC] = self._sums(np.arange(start, start + self._chunk)[None])
        for sums in sums_AC.T.tolist():
            deficits = [sum_ - count for sum_, count in zip(sums, counts, strict=True)]
            chosen.append(deficits.index(max(deficits)))
            counts[chosen[-1]] += 1.0
        return chosen, counts

    def _sums(self, samples_KM: np.ndarray) -> np.ndarray:
        """Returns float64 [K, A, M], the sums of the shares that decide over these samples."""
        sums = self.shares.before(np.maximum(samples_KM.reshape(-1), 1))[:, self.active_A]
        return np.ascontiguousarray(sums.reshape(*samples_KM.shape, -1).transpose(0, 2, 1))


def _first_largest(deficits_AM: np.ndarray) -> np.ndarray:
    """Returns int16 [M], `argmax` over the first axis; faster than numpy's for few rows."""
    largest_M = deficits_AM[0].copy()
    place_M = np.zeros(len(largest_M), dtype=np.int16)
    for place in range(1, len(deficits_AM)):
        place_M[deficits_AM[place] > largest_M] = place
        np.maximum(largest_M, deficits_AM[place], out=largest_M)
    return place_M
