"""Warnings about weights, alignments and held-out losses during a run, each once, with advice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from megatron_dwm.config.printing import printable

# One correlation over a batch of 32 has a standard deviation of 0.18, so several are averaged.
_MEASUREMENTS = 5
# Nats per token above a domain's best, in so many evaluations one after the other: a domain of few
# passages moves by several hundredths from one evaluation to the next.
_RISE, _EVALUATIONS = 0.1, 2


class Health:
    """Warns once of collapsed weights, once of noisy alignments, once of a domain that rises."""

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
        self._best: dict[str, float] = {}
        self._above_best: dict[str, int] = {}

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
                "validation.batch_size or training.global_batch_size",
            )

    def held_out(self, losses: Mapping[str, float]) -> None:
        """Check the losses of an evaluation (nats per token) by domain."""
        for domain, loss in losses.items():
            best = self._best[domain] = min(loss, self._best.get(domain, loss))
            rises = loss > best + _RISE
            self._above_best[domain] = self._above_best.get(domain, 0) + 1 if rises else 0
            if self._above_best[domain] == _EVALUATIONS:
                self._warn_once(
                    f"held-out {domain}",
                    f"the held-out loss of {printable(domain)} rises: {loss:.3f}, after a best of "
                    f"{best:.3f}; compare with the same run with policy.name uniform: if it rises "
                    "there too, the model memorizes, else the weights serve the target at its "
                    "expense",
                )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(text)
