"""The hypergradient inside a loop on Megatron-Core that is not ours.

    probe = MegatronProbe(model, optimizer, micro_batch_size=4)
    probe.aim(lambda: forward_backward(validation_iterator))          # z, from your validation pass
    with probe.attached(num_micro_batches=8) as alignments:
        forward_backward(training_iterator)                           # your training pass
    optimizer.step()
    alignments.values_n

This is the direction first (docs/METHOD.md, section 9): z = J_0 grad L_val(theta) with the moments
that stand, and hooks in your own training pass, whose gradient they do not change by a bit. `exact`
is section 2: through the step that your optimizer would take. The loss may be any sum over the
samples of a micro-batch: alignments are inner products with each sample's part of it.

Cost of `aim`: your validation pass. Of `attached`: one product of a forward pass's size. Of
`exact`: three passes of yours. Memory: z, 4 bytes a parameter of the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from megatron_dwm.bilevel.adapters import ADAPTERS, Adapter
from megatron_dwm.bilevel.frozen import multiply_by_frozen_jacobian
from megatron_dwm.bilevel.probe_hooks import Current, frozen, hooked, summed
from megatron_dwm.bilevel.problem import InnerOptimizer
from megatron_dwm.bilevel.slots import slice_of_z
from megatron_dwm.bilevel.virtual_step import kept_scales, prepare_virtual_step
from megatron_dwm.library.results import SampleAlignments
from megatron_dwm.model import Units, WrappedModel, clear_gradients
from megatron_dwm.runtime import Runtime, runtime_of_running_job

# Runs forward and backward passes into Megatron's gradient buffers; neither zeros them nor steps.
Pass = Callable[[], object]


class MegatronProbe:
    """Alignments of the samples of a model and an optimizer of Megatron-Core."""

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        *,
        micro_batch_size: int,
        inner: InnerOptimizer = "adam",
        adapters: Mapping[str, Adapter] = ADAPTERS,
    ) -> None:
        """A collective call, once, after Megatron-Core's groups, model and optimizer are made.

        model: the list of DistributedDataParallel chunks that the schedule takes.
        micro_batch_size: samples in a micro-batch; the batch is the second dimension of hidden
            states, [S, B, H]. Packed sequences ("thd") are one sample.
        inner: the step through which to differentiate, your Adam's or plain descent.
        adapters: how each class of modules enters its tangent; a class of your own is one entry.

        Raises:
            ValueError: the model is not in Megatron's wrappers, has a parameter that is not
                trained, or is trained in fp16.
            NotImplementedError: a module has parameters and no adapter.
        """
        chunks = list(model)
        if not all(isinstance(chunk, DistributedDataParallel) for chunk in chunks):
            kinds = sorted({type(chunk).__name__ for chunk in chunks})
            raise ValueError(
                f"model: expected Megatron-Core's DistributedDataParallel, got {kinds}"
            )
        if optimizer.config.fp16:
            raise ValueError("optimizer: fp16 scales the loss by a changing factor; use bf16")
        self._config = get_model_config(chunks[0])
        runtime = runtime_of_running_job()
        _require_trained(chunks, runtime.world_size)
        self._model = WrappedModel(chunks=chunks, transformer=self._config, runtime=runtime)
        self._optimizer, self._inner = optimizer, inner
        self._size, self._adapters = micro_batch_size, adapters
        self._z: dict[int, Tensor] | None = None
        with hooked(self._model, self._current(1), adapters):  # refuses what it does not know
            pass

    def aim(self, validate: Pass) -> None:
        """Compute z from the gradient of your validation pass (collective).

        Zeros the gradient buffers before and after. Raises NotImplementedError if the learning
        rates of the parameters differ (decoupled-lr).
        """
        model, optimizer = self._model, self._optimizer
        _require_one_rate(optimizer, model.runtime)
        with kept_scales(model):
            clear_gradients(model, optimizer)
            validate()
            multiply_by_frozen_jacobian(model, optimizer, self._inner)
        self._z = {id(p): slice_of_z(p).float().clone() for p in model.parameters()}
        clear_gradients(model, optimizer)

    @contextmanager
    def attached(self, num_micro_batches: int) -> Iterator[SampleAlignments]:
        """Probe the training pass that runs during the context (collective at its end).

        num_micro_batches: of this rank's pass. The alignments come back on every rank of a replica,
        for the samples of this data-parallel rank.

        Raises RuntimeError without a call of `aim` before, and if the pass has another number of
        micro-batches, or of samples in one, than the probe was told.
        """
        if self._z is None:
            raise RuntimeError("MegatronProbe.attached: call aim with a validation pass before")
        current = self._current(num_micro_batches)
        current.z_of = self._slice_of
        found = SampleAlignments(scale=self._data_parallel_scale())
        with self._probing(current), _noting_tokens(self._config, found):
            yield found
        found.end(summed(self._model, current))

    def exact(self, train: Pass, validate: Pass, *, num_micro_batches: int) -> SampleAlignments:
        """Returns the alignments through the step that `optimizer` would take (collective).

        train: your training pass of one batch; it runs twice, and has to read the same batch.
        Parameters, moments and FP8 scales keep their values; the gradient buffers are zero
        afterwards.
        """
        model, optimizer = self._model, self._optimizer
        _require_one_rate(optimizer, model.runtime)
        found = SampleAlignments(scale=self._data_parallel_scale())
        clear_gradients(model, optimizer)
        with kept_scales(model):
            with _noting_tokens(self._config, found):
                train()
            step = prepare_virtual_step(model, optimizer, self._inner)
            try:
                step.enter()
                clear_gradients(model, optimizer)
                validate()
                step.direction()
            except BaseException:
                step.restore(alone=True)  # the others may not be here
                raise
            step.restore()
            current = self._current(num_micro_batches)
            # z is in the gradient buffers, which must not be reduced.
            with frozen(model), self._probing(current), _unreduced(self._config):
                train()
        clear_gradients(model, optimizer)
        found.end(summed(model, current))
        return found

    def _current(self, num_micro_batches: int) -> Current:
        units = [Units(count=self._size) for _ in range(num_micro_batches)]
        zeros_n = torch.zeros(self._size * num_micro_batches, device=self._model.runtime.device)
        return Current(zeros_n.requires_grad_(), units, probed=num_micro_batches)

    def _slice_of(self, parameter: Any) -> Tensor:
        assert self._z is not None
        return self._z[id(parameter)]

    @contextmanager
    def _probing(self, current: Current) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(hooked(self._model, current, self._adapters))
            counts = [_MicroBatches(current) for _ in self._model.chunks]
            for chunk, count in zip(self._model.chunks, counts, strict=True):
                stack.callback(chunk.register_forward_pre_hook(count.enter).remove)
                stack.callback(chunk.register_forward_hook(count.leave).remove)
            yield
            for count in counts:
                count.require_all()

    def _data_parallel_scale(self) -> float:
        """Returns the factor of Megatron's wrapper: 1 over the number of ranks for a mean."""
        chunks = self._model.chunks
        [factor] = {b.gradient_scaling_factor for c in chunks for b in c.buffers}
        if chunks[0].ddp_config.average_in_collective:  # the reduction itself takes the mean
            factor /= self._model.runtime.data_context_group.size()
        return float(factor)


@contextmanager
def _noting_tokens(config: TransformerConfig, found: SampleAlignments) -> Iterator[None]:
    """Note the number of tokens by which Megatron divides a per-token loss at the end."""
    finalize = config.finalize_model_grads_func

    def noting(chunks: list[Module], num_tokens: Tensor | None = None, **options: Any) -> None:
        assert finalize is not None
        finalize(chunks, num_tokens, **options)
        # Summed over all ranks by the call, which divides by nothing if none counts.
        if num_tokens is not None and num_tokens > 0:
            found.scale /= float(num_tokens)

    with _finalizing(config, None if finalize is None else noting):
        yield


@contextmanager
def _finalizing(config: TransformerConfig, function: Callable[..., None] | None) -> Iterator[None]:
    """Have another function at the end of a pass; without one the buffers stay as they are."""
    before, config.finalize_model_grads_func = config.finalize_model_grads_func, function
    try:
        yield
    finally:
        config.finalize_model_grads_func = before


@contextmanager
def _unreduced(config: TransformerConfig) -> Iterator[None]:
    """Leave the gradient buffers as they are, also where the schedule starts their reduction."""
    before, config.grad_sync_func = config.grad_sync_func, None
    try:
        with _finalizing(config, None):
            yield
    finally:
        config.grad_sync_func = before


class _MicroBatches:
    """Hooks of a chunk that tell `current` which micro-batch runs.

    A chunk runs its micro-batches in order. Activation recomputation runs modules again in the
    backward pass, which begins at the chunk's output.
    """

    def __init__(self, current: Current) -> None:
        self._current, self._seen = current, 0
        self._told = len(current.units)

    def enter(self, *_: Any) -> None:
        """Begin the next micro-batch, forward."""
        if self._seen == self._told:
            raise RuntimeError(
                f"the pass has more than the {self._told} micro-batches that the probe was told "
                "(num_micro_batches)"
            )
        self._current.enter(self._seen)
        self._seen += 1

    def leave(self, _: Module, __: tuple[Any, ...], output: Any) -> None:
        """Note where the backward pass of this micro-batch begins."""
        number, tensor = self._seen - 1, output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._current.enter(number))

    def require_all(self) -> None:
        """Raise RuntimeError if there were fewer than the probe was told."""
        if self._seen < self._told:
            raise RuntimeError(
                f"the pass had {self._seen} micro-batches, and the probe was told {self._told} "
                "(num_micro_batches)"
            )


def _require_one_rate(optimizer: ChainedOptimizer, runtime: Runtime) -> None:
    """Raise NotImplementedError on every rank if learning rates differ (collective)."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    bounds = torch.tensor([max(rates), -min(rates)], dtype=torch.float32, device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    largest, smallest = float(bounds[0]), -float(bounds[1])
    if largest != smallest:
        raise NotImplementedError(
            f"optimizer: parameters have learning rates from {smallest:g} to {largest:g}; "
            "alignments need one for all (no decoupled-lr)"
        )


def _require_trained(chunks: Sequence[Module], world_size: int) -> None:
    """Raise ValueError on every rank if one of them has a frozen parameter (collective)."""
    parameters = (each for chunk in chunks for each in chunk.named_parameters())
    mine = next((name for name, parameter in parameters if not parameter.requires_grad), None)
    names: list[str | None] = [mine]
    if world_size > 1:
        names = [None] * world_size
        dist.all_gather_object(names, mine)
    if found := next(filter(None, names), None):
        raise ValueError(f"model: {found} is frozen; every parameter has to be trained")
