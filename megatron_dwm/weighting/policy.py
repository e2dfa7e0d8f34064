"""What decides the weights: one Protocol; each policy is a file, and a line in `build.py`.

A policy says what it needs to know of a sample. `tokens` and labels are there before the LLM runs;
`losses` and `features` are what the LLM's own forward pass has just made of the sample, and weights
from them are formed inside that pass (training/step.py), on the last pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_dwm.data.batch import Batch
from megatron_dwm.model import ForwardOutputs

Need = Literal["tokens", "losses", "features"]
NOTHING: frozenset[Need] = frozenset()


class Policy(Protocol):
    """A policy sees this data-parallel rank's samples of one optimiser step, or, where it needs
    losses or features and not the whole batch, one micro-batch of them.

    needs: what `weights` reads at this moment.
    whole_batch: a sample's weight depends on every sample of the global batch.
    """

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def whole_batch(self) -> bool: ...

    def weights(self, batch: Batch, reading: ForwardOutputs | None = None) -> Tensor:
        """float32 [n], one a sample, finite, non-negative, mean 1 over the global batch.

        reading: of the same samples; None where nothing of it is needed.
        """
        ...


@dataclass(frozen=True)
class WeightingUpdate:
    """One update of a learning policy.

    weights_n: float32, this replica's weights before the update.
    grad_norm: of the weighting model's gradient, before clipping; None without a model.
    cosine: of that gradient to the previous update's; None for the first.
    """

    weights_n: Tensor
    grad_norm: float | None = None
    cosine: float | None = None


@runtime_checkable
class LearningPolicy(Policy, Protocol):
    """A policy that learns from alignments.

    update_needs: what `update` reads of its samples.
    """

    @property
    def update_needs(self) -> frozenset[Need]: ...

    def update(
        self,
        batch: Batch,
        reading: ForwardOutputs | None,
        alignment_n: Tensor,
        learning_rate: float,
    ) -> WeightingUpdate:
        """Learn from this replica's samples and their s_i (collective over the world).

        learning_rate: the LLM's eta, where the scale of alignments matters.
        """
        ...

    def trust(self, signal_to_noise: float) -> None:
        """Take up a measured signal-to-noise of the alignments, before the update that it is of."""
        ...

    def save(self, directory: Path) -> None:
        """Write what can be used in another run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        ...


class UniformPolicy:
    """Every sample weighs 1: plain training."""

    needs: frozenset[Need] = NOTHING
    whole_batch = False

    def weights(self, batch: Batch, reading: ForwardOutputs | None = None) -> Tensor:
        """Ones, [n]."""
        return torch.ones(batch.size, device=batch.tokens_BS.device)
