"""Signal and noise in the alignments.

Meta-gradients can be pure noise without any error. From time to time the validation batch is
therefore split in two halves, and the alignments from both are compared: what they share is signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.methods import learns_from_alignments
from megatron_dwm.model.passes.micro_batches import probed_micro_batches

# A running mean over about five measurements, since one correlation over a batch of 32 has a
# standard deviation of 0.18.
_KEPT = 0.8


@dataclass(frozen=True)
class SignalToNoise:
    """Agreement of the alignments from two disjoint halves of a validation batch.

    agreement: Pearson correlation r of the two over the samples.
    ratio: variance of the signal over that of the noise in the alignments of the whole batch,
        2r / (1 - r), since the noise of a half has twice the variance; 0 if r is negative.
    """

    agreement: float
    ratio: float

    def columns(self) -> dict[str, float]:
        """Returns both by their names in metrics.jsonl."""
        return {
            "alignment_agreement": self.agreement,
            "alignment_signal_to_noise": self.ratio,
        }


def signal_to_noise(first_n: Tensor, second_n: Tensor) -> SignalToNoise:
    """Compare the alignments [n] of the same samples from the two halves.

    >>> round(signal_to_noise(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1.0, -1.0, 1.0])).ratio)
    34
    >>> signal_to_noise(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([-1.0, 2.0, 1.0])).ratio
    0.0
    """
    agreement = float(torch.corrcoef(torch.stack([first_n, second_n]).double())[0, 1])
    if agreement != agreement:  # NaN: constant alignments have no correlation
        return SignalToNoise(0.0, 0.0)
    return SignalToNoise(agreement, 2 * max(agreement, 0.0) / max(1.0 - agreement, 1e-12))


def why_no_noise(config: Config, passages: int, replicas: int) -> str | None:
    """Returns why noise cannot be measured with `passages` in a batch; None if it can.

    replicas: data-parallel replicas of the LLM.
    """
    if config.bilevel.estimator == "unroll":
        return "bilevel.estimator unroll gives no alignments of halves"
    if passages < 2:
        return "it is measured between halves of the validation batch, which has one passage"
    if config.training.global_batch_size < 3:
        return "two samples always correlate: training.global_batch_size has to be 3 or more"
    probed = _probed_samples(config, replicas)
    if config.weighting.unit == "sample" and probed < 3:
        return (
            f"weighting.probe_fraction leaves {probed} of a batch's samples with alignments, and "
            "it needs 3"
        )
    return None


def _probed_samples(config: Config, replicas: int) -> int:
    """Returns how many samples of a global batch have alignments in an update."""
    training = config.training
    if config.update_on != "ahead" or not learns_from_alignments(config.policy.name):
        return training.global_batch_size
    rows = training.micro_batch_size * replicas
    count = training.global_batch_size // rows
    return rows * probed_micro_batches(count, config.weighting.probe_fraction)


class Reliability:
    """Running mean of the signal's share of the alignments' variance, r = snr / (1 + snr).

    r is the factor that brings a noisy measurement closest to its signal in least squares (Wiener's
    filter), so updates are multiplied by it. `value` is None before the first measurement.
    """

    def __init__(self) -> None:
        self.value: float | None = None

    def observe(self, signal_to_noise: float | None) -> None:
        """Record one measurement, which is 0 or more; None if none was made."""
        if signal_to_noise is None:
            return
        share = signal_to_noise / (1.0 + signal_to_noise)
        self.value = share if self.value is None else _KEPT * self.value + (1 - _KEPT) * share

    @property
    def factor(self) -> float:
        """The reliability r; 1 before the first measurement."""
        return 1.0 if self.value is None else self.value
