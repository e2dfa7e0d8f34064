"""An update without a hypergradient: the method reads the target under the LLM as it is.

Cost: one forward pass of the passages. The LLM does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import PassResult, forward_only
from megatron_dwm.model.passes.micro_batches import largest_micro_batch
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.learner import Learner
from megatron_dwm.weighting import Method


@dataclass(frozen=True, kw_only=True)
class TargetRead:
    """The result of one reading. val_loss: mean over the passages' counted tokens."""

    val_loss: float


def read_target(learner: Learner, method: Method, passages: Batch) -> TargetRead | None:
    """Let the method read this replica's passages (collective).

    Returns None, and the method reads nothing, if losses or features are not finite.
    """
    llm, passages = learner.llm, _without_padding(passages)
    size = largest_micro_batch(passages.size, learner.micro_batch_size, llm.micro_batches_multiple)
    early_layer = method.update_needs.early_layer
    result = forward_only(llm, unit(passages, size), early_layer=early_layer)
    val_loss = _finite_mean(result, llm.runtime)
    if not math.isfinite(val_loss):
        return None
    method.read_target(passages, result.outputs)
    return TargetRead(val_loss=val_loss)


def _without_padding(passages: Batch) -> Batch:
    """Returns rows that are units as units of the tokens up to the last counted label.

    A passage of `validation.loss_on last_word` is shorter than its row, and features are means over
    a unit's tokens. Rows count the same, but those without loss, which fill up the batch, not.
    """
    if passages.units_BS is not None:
        return passages
    counted_BS = passages.loss_mask_BS > 0
    later_BS = counted_BS.flip(1).cumsum(1).flip(1) > 0
    read_BS = later_BS | ~counted_BS.any(dim=1, keepdim=True)
    units_BS = torch.where(read_BS, 0, -1)
    return replace(passages, units_BS=units_BS, equal_shares=True)


def _finite_mean(result: PassResult, runtime: Runtime) -> float:
    """Returns the mean token loss of all replicas; NaN if a feature is not finite (collective)."""
    columns: list[Tensor] = [
        result.loss_sums_n.double().sum(),
        result.token_counts_n.double().sum(),
    ]
    if result.features is not None:
        columns.append((~torch.isfinite(result.features.flat())).double().sum())
    sums = torch.stack(columns)
    dist.all_reduce(sums, group=runtime.data_group)
    loss_sum, count, *wrong = sums.tolist()
    return math.nan if any(wrong) or not count else loss_sum / count
