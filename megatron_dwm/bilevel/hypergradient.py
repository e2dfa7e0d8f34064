"""The hypergradient of the validation loss with respect to sample weights (METHOD.md, section 2).

    g(w)   = (1/n) sum_i w_i grad l_i(theta)             one forward and backward pass
    theta' = theta - eta * u(g(w))                       virtual_step.py
    z      = J^T grad L_val(theta')                      one forward and backward pass
    s_i    = <z, grad l_i(theta)>                        one pass of an estimator
    dL_val(theta')/dw_i = -(eta/n) * s_i

No second derivative appears: w enters the gradient linearly, and theta does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.bilevel.virtual_step import InnerOptimizer, take_virtual_step
from megatron_dwm.model import LLM, MicroBatch, clear_gradients, forward_backward
from megatron_dwm.model.objective import (
    TokenBatch,
    token_count,
    token_mean,
    unit,
    weighted,
    weighted_denominator,
)

# (llm with z in its gradient buffers, micro-batches of the unit objective) -> [n]
Estimator = Callable[[LLM, list[MicroBatch]], Tensor]

ESTIMATORS: dict[str, Estimator] = {"tangent_probe": tangent_probe}


@dataclass(frozen=True)
class Hypergradient:
    """What one update of the weighting model learns from.

    alignment_n: float32, s_i of this data-parallel rank's samples, alike on its whole replica.
    weight_gradient_n: float32, dL_val(theta')/dw_i of the same samples.
    train_loss: unweighted mean of l_i(theta).  val_loss: L_val(theta'), mean over tokens.
    grad_norm: |g(w)| before clipping.
    """

    alignment_n: Tensor
    weight_gradient_n: Tensor
    train_loss: float
    val_loss: float
    grad_norm: float


def hypergradient(
    llm: LLM,
    optimizer: ChainedOptimizer,
    train_batch: TokenBatch,
    weights_n: Tensor,
    val_batch: TokenBatch,
    *,
    micro_batch_size: int,
    estimator: str = "tangent_probe",
    inner: InnerOptimizer = "adam",
) -> Hypergradient:
    """The hypergradient at `weights_n`; the LLM and its optimiser are left bit for bit as found.

    train_batch, val_batch: this data-parallel rank's samples.  weights_n: float32, mean 1.
    Gradient buffers end zeroed.
    """
    train = weighted(train_batch, weights_n, micro_batch_size)
    clear_gradients(llm, optimizer)
    result = forward_backward(llm, train, denominator=weighted_denominator(train_batch))
    step = take_virtual_step(llm, optimizer, inner)
    clear_gradients(llm, optimizer)
    val_loss = _validation_gradient(llm, val_batch, micro_batch_size)
    step.direction()
    step.restore()
    alignment_n = ESTIMATORS[estimator](llm, unit(train_batch, micro_batch_size))
    clear_gradients(llm, optimizer)
    n = len(weights_n) * llm.runtime.data_size
    eta = optimizer.param_groups[0]["lr"]
    return Hypergradient(
        alignment_n=alignment_n,
        weight_gradient_n=alignment_n * (-eta / n),
        train_loss=float(mean_over_data(llm, result.sample_losses_n)),
        val_loss=val_loss,
        grad_norm=step.grad_norm,
    )


def _validation_gradient(llm: LLM, batch: TokenBatch, micro_batch_size: int) -> float:
    """Leave grad L_val in the gradient buffers; L_val comes back."""
    result = forward_backward(
        llm, token_mean(batch, micro_batch_size), denominator=token_count(batch)
    )
    sums = torch.stack([result.loss_sums_n.sum(), result.token_counts_n.sum()])
    dist.all_reduce(sums, group=llm.runtime.data_group)
    return float(sums[0] / sums[1])


def mean_over_data(llm: LLM, values_n: Tensor) -> Tensor:
    """Mean over the samples of every data-parallel rank (each holds as many)."""
    mean = values_n.float().mean()
    dist.all_reduce(mean, group=llm.runtime.data_group)
    return mean / llm.runtime.data_size
