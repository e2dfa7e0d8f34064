"""One pass of micro-batches through Megatron-Core's pipeline schedules.

Training, the validation pass at the virtual parameters, the tangent probe and evaluation all run
the LLM through this file. A pass minimizes

    sum over units and tokens of coefficient * weight * token loss / denominator,

where the denominator is a float summed over micro-batches and data-parallel ranks. The weights are
1, or `weigh` computes them inside the pass from the losses and features of the units. With
coefficients and weights of 1 these are the operations of Megatron-LM's own per-token loss, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_dwm.model.llm import LLM
from megatron_dwm.model.passes.forward_outputs import Features, FeatureTap, ForwardOutputs
from megatron_dwm.model.passes.micro_batch import MicroBatch, as_layers_take, attention_borders
from megatron_dwm.runtime import Runtime

# Megatron-Core sums an integer token count. It is unused here, because weights make it a float.
_NO_COUNT = torch.zeros([], dtype=torch.int)

# (index of a micro-batch, its losses and features) -> weights_U; called on the last stage.
Weigh = Callable[[int, ForwardOutputs], Tensor]
# -> this data-parallel rank's part of the denominator, when the last micro-batch is done; on every
# stage.
Denominator = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """Losses, weights and features of the local units, on every rank of the replica.

    loss_sums_n: float32, masked sum of the token losses of each unit, in order.
    token_counts_n: float32, number of tokens in each of those sums.
    weights_n: float32, the weights that `weigh` returned; None without it.
    features: None unless the pass was asked to keep them.
    relative_n: float32, the weights before the pass divided by their mean; None if it did not.
    reference_losses_n: float32, losses of the method's reference model; None without one.
    """

    loss_sums_n: Tensor
    token_counts_n: Tensor
    weights_n: Tensor | None = None
    relative_n: Tensor | None = None
    features: Features | None = None
    reference_losses_n: Tensor | None = None

    @property
    def unit_losses_n(self) -> Tensor:
        """Token-mean loss of every local unit; 0 for a unit without a counted token."""
        return self.loss_sums_n / self.token_counts_n.clamp(min=1.0)

    @property
    def outputs(self) -> ForwardOutputs:
        """Losses and features of the local units, as a method takes them."""
        return ForwardOutputs(losses_n=self.unit_losses_n, features=self.features)


@dataclass(frozen=True, kw_only=True)
class _PassOptions:
    """The options of a pass, for the functions that Megatron calls."""

    llm: LLM
    on_micro_batch: Callable[[int], None] | None = None
    weigh: Weigh | None = None
    tap: FeatureTap | None = None
    keeps_features: bool = False


def forward_backward(
    llm: LLM,
    micro_batches: Sequence[MicroBatch],
    *,
    denominator: float | Tensor | Denominator | None,
    on_micro_batch: Callable[[int], None] | None = None,
    weigh: Weigh | None = None,
    early_layer: int | None = None,
    keep_features: bool = False,
) -> PassResult:
    """Run forward and backward over `micro_batches`, adding gradients to the gradient buffers.

    denominator: this data-parallel rank's part of the global denominator, or what returns it after
        the last micro-batch. None leaves the gradients local and unscaled (the tangent probe forms
        none).
    on_micro_batch: called with the index of a micro-batch before its forward and its backward pass.
    weigh: returns the weights of a micro-batch before its losses are reduced.
    early_layer: collect features, the early ones from this layer (from 1), for `weigh`, and for the
        result if `keep_features`.
    """
    tap = None if early_layer is None else FeatureTap(llm, early_layer)
    options = _PassOptions(
        llm=llm, on_micro_batch=on_micro_batch, weigh=weigh, tap=tap, keeps_features=keep_features
    )
    return _run(llm, micro_batches, options, forward_only=False, denominator=denominator)


def forward_only(
    llm: LLM, micro_batches: Sequence[MicroBatch], *, early_layer: int | None = None
) -> PassResult:
    """Returns losses of `micro_batches` without gradients, and features if `early_layer` is set."""
    tap = None if early_layer is None else FeatureTap(llm, early_layer)
    options = _PassOptions(llm=llm, tap=tap, keeps_features=tap is not None)
    with torch.no_grad(), without_recomputation(llm):
        return _run(llm, micro_batches, options, forward_only=True, denominator=None)


@contextmanager
def without_recomputation(llm: LLM) -> Iterator[None]:
    """Put a model that recomputes whole layers in evaluation mode, for passes without gradients.

    Otherwise Transformer Engine's checkpoint keeps the scales of delayed FP8 for a backward pass
    that never comes, and a later one takes them for its own.
    """
    recomputes = llm.transformer.recompute_granularity == "full"
    for module in llm.modules if recomputes else ():
        module.eval()
    try:
        yield
    finally:
        for module in llm.modules if recomputes else ():
            module.train()


def _run(
    llm: LLM,
    micro_batches: Sequence[MicroBatch],
    options: _PassOptions,
    *,
    forward_only: bool,
    denominator: float | Tensor | Denominator | None,
) -> PassResult:
    micro_batches = as_layers_take(llm, micro_batches)
    batch_size, part_length = micro_batches[0].tokens_BS.shape
    llm.transformer.finalize_model_grads_func = (
        None if denominator is None else partial(_finalize, llm, denominator)
    )
    with nullcontext() if options.tap is None else options.tap.attached():
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, options),
            data_iterator=[enumerate(micro_batches) for _ in llm.chunks],
            model=llm.chunks,
            num_microbatches=len(micro_batches),
            seq_length=part_length * llm.runtime.context_size,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )
    return _collect(llm, micro_batches, options, outputs)


def _forward_step(
    options: _PassOptions, iterator: Iterator[tuple[int, MicroBatch]], chunk: Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron's forward_step_func."""
    index, batch = next(iterator)
    notify = options.on_micro_batch
    if notify is not None:
        notify(index)
    with nullcontext() if options.tap is None else options.tap.listening(index, batch.units):
        output = chunk(
            batch.tokens_BS,
            batch.position_ids_BS,
            None,
            labels=batch.labels_BS,
            packed_seq_params=attention_borders(options.llm, batch),
        )
    if notify is not None and output.requires_grad:
        # Activation recomputation runs modules again in the backward pass. By then another
        # micro-batch may have run forward.
        output.register_hook(lambda _: notify(index))
    return output, partial(_loss, options, index, batch)


def _loss(
    options: _PassOptions, index: int, batch: MicroBatch, token_losses_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss_func: returns (sum to differentiate, unused count, [U, columns] to keep)."""
    losses, units = token_losses_BS.float(), batch.units
    loss_sums_U = units.sum_of_rows(losses.detach() * batch.loss_mask_BS)
    features = None if options.tap is None else options.tap.of(index)
    coefficients = batch.coefficients_BS
    if options.weigh is not None:
        # Weights depend on whole units. Without them the parts are added after the pass.
        loss_sums_U, features = _whole(options.llm.runtime, loss_sums_U, features)
        counts_U = batch.token_counts_U.clamp(min=1.0)
        outputs = ForwardOutputs(losses_n=loss_sums_U / counts_U, features=features)
        weights_U = options.weigh(index, outputs)
        coefficients = coefficients * units.at_tokens(weights_U)
    columns = [loss_sums_U[:, None]]
    if options.weigh is not None:
        columns.append(weights_U[:, None])
    if options.keeps_features and features is not None:
        columns.append(features.flat())
    total = torch.sum(losses.view(-1) * coefficients.reshape(-1))
    return total, _NO_COUNT, torch.cat(columns, dim=1)


def _whole(
    runtime: Runtime, loss_sums_U: Tensor, features: Features | None
) -> tuple[Tensor, Features | None]:
    """Returns both, added over the parts of the rows (collective)."""
    if runtime.context_size == 1:
        return loss_sums_U, features
    columns = [loss_sums_U[:, None]] + ([] if features is None else [features.flat()])
    sums = runtime.sum_over_context(torch.cat(columns, dim=1))
    return sums[:, 0], None if features is None else Features.from_flat(sums[:, 1:])


def _finalize(
    llm: LLM,
    denominator: float | Tensor | Denominator,
    chunks: list[Any],
    _: Tensor | None,
    **arguments: Any,
) -> None:
    """Megatron's finalize_model_grads with a float denominator in place of its integer count."""
    finalize_model_grads(chunks, None, **arguments)
    part = denominator() if callable(denominator) else denominator
    # A tensor made of the host's number would be copied to the device, and the host would wait.
    total = torch.zeros([], dtype=torch.float32, device=llm.runtime.device).add_(part)
    dist.all_reduce(total, group=llm.runtime.data_group)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / total)


def _collect(
    llm: LLM, micro_batches: Sequence[MicroBatch], options: _PassOptions, outputs: list[Tensor]
) -> PassResult:
    """Split the kept columns into a result, on every stage."""
    counts_n = torch.cat([batch.token_counts_U for batch in micro_batches])
    first = 1 if options.weigh is None else 2
    width = 2 * llm.shape.hidden_size if options.keeps_features else 0
    kept = (
        torch.cat(outputs)
        if llm.runtime.is_last_stage
        else counts_n.new_empty(len(counts_n), first + width)
    )
    if options.weigh is None and llm.runtime.is_last_stage:
        llm.runtime.sum_over_context(kept)
    kept = llm.runtime.broadcast_from_last_stage(kept)
    return PassResult(
        loss_sums_n=kept[:, 0],
        token_counts_n=counts_n,
        weights_n=None if options.weigh is None else kept[:, 1],
        features=Features.from_flat(kept[:, first:]) if options.keeps_features else None,
    )
