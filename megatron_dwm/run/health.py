"""Warnings about weights and alignments during a run, each printed once, with advice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# One correlation over a batch of 32 has a standard deviation of 0.18, so several are averaged.
_MEASUREMENTS = 5


class Health:
    """Warns once if the weights collapse, and once if the alignments are mostly noise."""

    def __init__(
        self,
        *,
        min_effective_sample_size: float,
        min_signal_to_noise: float,
        gentler: str,
        warn: Callable[[str], None],
    ) -> None:
        """Set the bounds of the two warnings.

        They are `weighting.warn_effective_sample_size` and `bilevel.min_signal_to_noise`.
        """
        self._min_size, self._min_ratio = min_effective_sample_size, min_signal_to_noise
        self._gentler, self._warn = gentler, warn
        self._ratios: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._warned: set[str] = set()

    def effective_sample_size(self, size: float) -> None:
        """Check the effective sample size of a step's weights, as a fraction of the batch."""
        if size < self._min_size:
            self._warn_once(
                "collapse",
                f"the weights have collapsed: effective sample size {size:.3f} of a batch, below "
                f"{self._min_size}; {self._gentler}",
            )

    def signal_to_noise(self, ratio: float) -> None:
        """Check a measured signal-to-noise ratio of the alignments."""
        self._ratios.append(ratio)
        mean = sum(self._ratios) / len(self._ratios)
        if len(self._ratios) == _MEASUREMENTS and mean < self._min_ratio:
            self._warn_once(
                "noise",
                f"the hypergradient is mostly noise: signal-to-noise {mean:.3f} over "
                f"{_MEASUREMENTS} measurements, below {self._min_ratio}; enlarge "
                "validation.batch_size or training.global_batch_size, or start later with "
                "weighting.warmup_steps",
            )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(text)
