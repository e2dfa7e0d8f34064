"""A reference model that follows the LLM: copied from it now and then, and trained in between.

    minimize  L_val(w) + penalty * sum_u p_u a_u l_u(w)       a_u: the weights of the selected units

on one batch of training text and one of validation text a step, with an optimizer of its own. Both
terms are one pass through the pipeline: the validation rows are the first micro-batches, and the
coefficients of the tokens carry the two denominators. The reference has the layout and precision of
the LLM. Memory: a second model with gradients and Adam's state. The moments stay when the reference
is copied anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.data import Batch
from megatron_dwm.model import (
    LLM,
    MicroBatch,
    PassResult,
    clear_gradients,
    forward_backward,
    invalidate_weight_caches,
)
from megatron_dwm.model.optimizer_step import step_if_finite
from megatron_dwm.model.parameter_gather import gather_now
from megatron_dwm.model.passes.objective import (
    token_count,
    token_mean,
    weighted,
    weighted_denominator,
)


@dataclass(frozen=True, kw_only=True)
class ReferenceStep:
    """One step of the reference.

    val_loss: L_val before the step, mean over tokens. grad_norm: before clipping; not finite if the
        step was not taken.
    """

    val_loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class DynamicReference:
    """The reference with its optimizer. micro_batch_size: the largest of a pass."""

    llm: LLM
    optimizer: ChainedOptimizer
    learning_rate: float
    penalty: float
    micro_batch_size: int

    @torch.no_grad()
    def copy_from(self, llm: LLM) -> None:
        """Take the parameters of `llm`, which has the same layout (collective)."""
        gather_now(llm)
        for mine, other in zip(self.llm.parameters(), llm.parameters(), strict=True):
            mine.copy_(other)
        self.optimizer.reload_model_params()
        invalidate_weight_caches(self.llm)

    def learn(self, batch: Batch, weights_U: torch.Tensor, passages: Batch) -> ReferenceStep:
        """Take one step on this replica's rows (collective)."""
        llm, optimizer = self.llm, self.optimizer
        size = _common_size(batch.size, passages.size, self.micro_batch_size, llm)
        validation = _over(token_mean(passages, size), _total(token_count(passages), llm))
        denominator = _total(float(weighted_denominator(batch)), llm) / max(self.penalty, 1e-30)
        training = _over(weighted(batch, weights_U, size), denominator)
        clear_gradients(llm, optimizer)
        # The coefficients carry the denominators, and replicas are summed.
        result = forward_backward(
            llm, [*validation, *training], denominator=1.0 / llm.runtime.data_size
        )
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        grad_norm = step_if_finite(optimizer)
        clear_gradients(llm, optimizer)
        return ReferenceStep(val_loss=_val_loss(result, passages, llm), grad_norm=grad_norm)


def _over(micro_batches: Sequence[MicroBatch], denominator: float) -> list[MicroBatch]:
    return [
        replace(batch, coefficients_BS=batch.coefficients_BS / denominator)
        for batch in micro_batches
    ]


def _total(value: float, llm: LLM) -> float:
    """Returns the sum over replicas (collective)."""
    total = torch.tensor(value, dtype=torch.float64, device=llm.runtime.device)
    dist.all_reduce(total, group=llm.runtime.data_group)
    return float(total)


def _common_size(rows: int, others: int, largest: int, llm: LLM) -> int:
    """Returns the largest micro-batch that divides both numbers of rows."""
    multiple = llm.micro_batches_multiple
    sizes = [
        size
        for size in range(1, largest + 1)
        if rows % size == 0 and others % size == 0 and (rows + others) // size % multiple == 0
    ]
    assert sizes, (rows, others, multiple)
    return max(sizes)


def _val_loss(result: PassResult, passages: Batch, llm: LLM) -> float:
    """Returns the mean token loss of the passages, which come first in the pass (collective)."""
    count = passages.units.count
    sums = torch.stack(
        [result.loss_sums_n[:count].double().sum(), result.token_counts_n[:count].double().sum()]
    )
    dist.all_reduce(sums, group=llm.runtime.data_group)
    return float(sums[0] / sums[1])
