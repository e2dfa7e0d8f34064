"""How far the alignments can be trusted, from their measured signal-to-noise."""

from __future__ import annotations

# One correlation over a batch of 32 has a standard deviation of 0.18 (training/trust.py): a running
# mean over about five measurements.
_KEPT = 0.8


class Reliability:
    """Running mean of the signal's share in the alignments' variance, r = snr / (1 + snr).

    r is the factor that brings a noisy measurement closest to its signal in least squares (Wiener's
    filter), so it is what the step of an update is shortened by. value: None before the first
    measurement.
    """

    def __init__(self) -> None:
        self.value: float | None = None

    def observe(self, signal_to_noise: float) -> None:
        """Take up one measurement, 0 or more."""
        share = signal_to_noise / (1.0 + signal_to_noise)
        self.value = share if self.value is None else _KEPT * self.value + (1 - _KEPT) * share

    @property
    def factor(self) -> float:
        """r; 1 before the first measurement."""
        return 1.0 if self.value is None else self.value
