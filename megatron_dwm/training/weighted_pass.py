"""The first pass of a step or an update: weights from the method, and g(w) in the buffers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dwm.bilevel import AheadProbe
from megatron_dwm.data import Batch
from megatron_dwm.model import (
    ForwardOutputs,
    PassResult,
    clear_gradients,
    forward_backward,
    forward_only,
)
from megatron_dwm.model.passes.objective import unit, weighted, weighted_denominator
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.relative_total import RelativeTotal
from megatron_dwm.weighting import Counters, Method, Needs


def weighted_pass(
    learner: Learner,
    method: Method,
    batch: Batch,
    counters: Counters,
    *,
    for_update: bool,
    aligned: ForwardOutputs | None = None,
    probe: AheadProbe | None = None,
) -> PassResult:
    """Compute g(w) into the gradient buffers; the result has the method's weights (collective).

    for_update: keep what an update of the method reads.
    aligned: alignments of the batch, for a method that weighs by them.
    probe: also computes alignments of the batch in this pass.
    """
    llm, size = learner.llm, learner.micro_batch_size
    needs = method.needs(counters)
    kept = method.update_needs if for_update else Needs()
    early_layer = kept.early_layer
    weights_n, weigh = torch.ones(batch.units.count, device=llm.runtime.device), None
    total = RelativeTotal(llm.runtime) if needs.relative else None
    reference_n = method.reference_losses(batch)
    if not needs.forward_pass:
        weights_n = method.weights(batch, aligned, counters)
    elif needs.whole_batch and (batch.size > size or needs.on_every_rank):
        # Every weight needs all micro-batches, and a pipeline cannot keep all of them in memory. So
        # an extra forward pass comes first.
        first = forward_only(llm, unit(batch, size), early_layer=needs.early_layer)
        outputs = replace(first.outputs, reference_losses_n=reference_n)
        weights_n = method.weights(batch, outputs, counters)
    else:
        early_layer = needs.early_layer if early_layer is None else early_layer
        rows = batch.micro_batches(size)
        counts = [part.units.count for part in rows]
        references = [None] * len(rows) if reference_n is None else reference_n.split(counts)

        def weigh(index: int, outputs: ForwardOutputs) -> Tensor:
            outputs = replace(outputs, reference_losses_n=references[index])
            found_U = method.weights(rows[index], outputs, counters)
            if total is not None:
                total.add(rows[index], found_U)
            return found_U

    clear_gradients(llm, learner.optimizer)
    micro_batches = weighted(batch, weights_n, size)
    with nullcontext() if probe is None else probe.attached(micro_batches) as on_micro_batch:
        result = forward_backward(
            llm,
            micro_batches,
            denominator=weighted_denominator(batch) if total is None else total.of_replica,
            on_micro_batch=on_micro_batch,
            weigh=weigh,
            early_layer=early_layer,
            keep_features=kept.early_layer is not None,
        )
    result = replace(result, reference_losses_n=reference_n)
    if total is not None:
        return total.divided(result, batch)
    return result if weigh is not None else replace(result, weights_n=weights_n)
