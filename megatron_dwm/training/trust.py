"""Can the weights be trusted? Signal-to-noise of the alignments, and warnings that say what to do.

Meta-gradients can be noise without anything failing. The validation batch is therefore cut in two
now and then, and the alignments from either half are compared: what they share is signal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dwm.config import Config

# One correlation over a batch of 32 has a standard deviation of 0.18: judge by several.
_MEASUREMENTS = 5


def signal_to_noise(first_n: Tensor, second_n: Tensor) -> tuple[float, float]:
    """(agreement, ratio) of the alignments from two disjoint halves of a validation batch.

    agreement: Pearson correlation r of the two over the samples. ratio: variance of the signal over
    that of the noise in the whole batch's alignments, 2r / (1 - r) (each half is signal plus noise
    of twice the whole's variance); 0 where r is negative.
    """
    agreement = float(torch.corrcoef(torch.stack([first_n, second_n]).double())[0, 1])
    if agreement != agreement:  # constant alignments: nothing to tell samples apart by
        return 0.0, 0.0
    return agreement, 2 * max(agreement, 0.0) / max(1.0 - agreement, 1e-12)


class Watch:
    """Warns once of collapse and once of noise."""

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        self._min_size = config.weighting.warn_effective_sample_size
        self._min_ratio = config.bilevel.min_signal_to_noise
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
