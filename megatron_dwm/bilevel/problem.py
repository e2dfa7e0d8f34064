"""The input and the result of every estimator of the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel.objectives import TOKEN_MEAN, ValidationObjective
from megatron_dwm.model import LLM
from megatron_dwm.model.passes.objective import TokenBatch

InnerOptimizer = Literal["adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The upper level: an LLM mid-training, and the validation loss that is to fall.

    inner: the virtual step: the step that training would take (adam) or plain descent (sgd).
    objective: the loss on the validation batch that the weights are to lower.
    """

    llm: LLM
    optimizer: ChainedOptimizer
    val_batch: TokenBatch
    micro_batch_size: int
    inner: InnerOptimizer = "adam"
    objective: ValidationObjective = TOKEN_MEAN

    @property
    def learning_rate(self) -> float:
        """Learning rate eta of the virtual step."""
        return self.optimizer.param_groups[0]["lr"]


@dataclass(frozen=True, kw_only=True)
class Problem(Target):
    """One bi-level step: a target, and this data-parallel rank's units.

    weights_n: float32, mean 1 over the global batch; the point at which to differentiate.
    sketch_size: also sketch the units' steps, with this many numbers each (sketch.py); None: no.
    """

    train_batch: TokenBatch
    weights_n: Tensor
    sketch_size: int | None = None

    def mean(self, values_n: Tensor) -> Tensor:
        """Returns the mean over the units of this rank, in their shares."""
        sizes_n = self.train_batch.units.sizes_U
        if sizes_n is None:
            return values_n.mean()
        return (sizes_n * values_n).sum() / sizes_n.sum()

    def shares(self) -> Tensor:
        """Returns [n]: each unit's share of the objective, which is 1/n for rows (collective)."""
        sizes_n = self.train_batch.units.sizes_U
        if sizes_n is None:
            num_rows = len(self.weights_n) * self.llm.runtime.data_size
            return torch.full_like(self.weights_n, 1.0 / num_rows)
        return sizes_n / sum_over_data(self.llm, sizes_n.sum())


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """The result of an estimator, from which the weighting model learns.

    alignment_n: float32, s_u of this data-parallel rank's units, the same on its whole replica.
    val_loss: L_val(theta'), mean over tokens; L_val(theta) if the direction came first (ahead.py).
    grad_norm: |g(w)| before clipping; None if the direction came first.
    known_n: bool, False for a unit whose alignment was not computed; None: all are known.
    halves_2n: float32 [2, n], s_i from each half of the validation batch; None unless asked for.
    sketch_nK: float32, sketches of J grad l_u, without the change of the clipping factor; None
        unless asked for.
    """

    alignment_n: Tensor
    val_loss: float
    grad_norm: float | None
    known_n: Tensor | None = None
    halves_2n: Tensor | None = None
    sketch_nK: Tensor | None = None

    def known_alignments(self) -> Tensor:
        """Returns the alignments [n], NaN where they are not known."""
        known_n = self.known_n
        return self.alignment_n if known_n is None else self.alignment_n.where(known_n, torch.nan)

    def weight_gradient_n(self, problem: Problem) -> Tensor:
        """Returns dL_val(theta')/dw_u = -eta * (share of u) * s_u (collective)."""
        return self.alignment_n * problem.shares() * -problem.learning_rate


def sum_over_data(llm: LLM, values: Tensor) -> Tensor:
    """Sum `values` over the data-parallel ranks, in place (collective)."""
    dist.all_reduce(values, group=llm.runtime.data_group)
    return values
