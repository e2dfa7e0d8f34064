"""What every estimator of the hypergradient takes, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel.objectives import TOKEN_MEAN, ValidationObjective
from megatron_dwm.model import LLM
from megatron_dwm.model.passes.objective import TokenBatch

InnerOptimizer = Literal["adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One bi-level step: an LLM mid-training, and this data-parallel rank's samples.

    weights_n: float32, mean 1 over the global batch; the point at which to differentiate.
    inner: the virtual step, the one that training would take (adam) or plain descent (sgd).
    objective: what the validation batch is to lower.
    """

    llm: LLM
    optimizer: ChainedOptimizer
    train_batch: TokenBatch
    weights_n: Tensor
    val_batch: TokenBatch
    micro_batch_size: int
    inner: InnerOptimizer = "adam"
    objective: ValidationObjective = TOKEN_MEAN

    @property
    def learning_rate(self) -> float:
        """eta of the virtual step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def num_samples(self) -> int:
        """n, over all data-parallel ranks."""
        return len(self.weights_n) * self.llm.runtime.data_size


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """What one update of the weighting model learns from.

    alignment_n: float32, s_i of this data-parallel rank's samples, alike on its whole replica.
    val_loss: L_val(theta'), mean over tokens.
    grad_norm: |g(w)| before clipping.
    halves_2n: float32 [2, n], s_i from either half of the validation batch where it was asked for.
    """

    alignment_n: Tensor
    val_loss: float
    grad_norm: float
    halves_2n: Tensor | None = None

    def weight_gradient_n(self, problem: Problem) -> Tensor:
        """dL_val(theta')/dw_i = -(eta/n) * s_i."""
        return self.alignment_n * (-problem.learning_rate / problem.num_samples)


def sum_over_data(llm: LLM, values: Tensor) -> Tensor:
    """Sum over the data-parallel ranks, in place."""
    dist.all_reduce(values, group=llm.runtime.data_group)
    return values
