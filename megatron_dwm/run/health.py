"""Warnings while a run goes on, each said once, that say what to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# One correlation over a batch of 32 has a standard deviation of 0.18: judge by several.
_MEASUREMENTS = 5


class Health:
    """Warns once of weights that collapse and once of alignments that are noise."""

    def __init__(
        self,
        *,
        min_effective_sample_size: float,
        min_signal_to_noise: float,
        warn: Callable[[str], None],
    ) -> None:
        """The two bounds are `weighting.warn_effective_sample_size` and
        `bilevel.min_signal_to_noise`.
        """
        self._min_size, self._min_ratio = min_effective_sample_size, min_signal_to_noise
        self._warn = warn
        self._ratios: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._said: set[str] = set()

    def effective_sample_size(self, size: float) -> None:
        """Look at the effective sample size of a step's weights, a fraction of the batch."""
        if size < self._min_size:
            self._say(
                "collapse",
                f"the weights have collapsed: effective sample size {size:.3f} of a batch, below "
                f"{self._min_size}; raise weighting.min_effective_sample_size or "
                "weighting.uniform_floor, or lower weighting.learning_rate",
            )

    def signal_to_noise(self, ratio: float) -> None:
        """Look at a measured signal-to-noise of the alignments."""
        self._ratios.append(ratio)
        mean = sum(self._ratios) / len(self._ratios)
        if len(self._ratios) == _MEASUREMENTS and mean < self._min_ratio:
            self._say(
                "noise",
                f"the hypergradient is mostly noise: signal-to-noise {mean:.3f} over "
                f"{_MEASUREMENTS} measurements, below {self._min_ratio}; enlarge "
                "validation.batch_size or training.global_batch_size, or start later with "
                "weighting.warmup_steps",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._warn(text)
