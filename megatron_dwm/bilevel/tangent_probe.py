"""Per-sample inner products <z, grad l_i> from one ordinary backward pass (METHOD.md, section 2).

Every parameter W enters its module linearly, f(a; W), so

    <z, grad l_i> = sum over modules and over the tokens t of sample i of <d_t, f(a_t; Z)>,

with d the gradient of the module's output and Z the slice of z that belongs to W. A hook applies a
function to each module's output that is the identity forward and adds those inner products to
`alignment_n` backward; it saves only what plain training saves, too. The parameters are frozen in
this pass, so no weight gradient is formed and the pass costs one plain training step: forward,
input gradients, and one product of a weight gradient's size. z is read from the gradient buffers.
adapters.py has the inner products of each module class.

Tensor parallel: a module whose weight is split gives each rank a partial sum. A module that every
rank holds whole (a norm) is counted on one rank, or on all ranks if each has its own part of the
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_dwm.bilevel.adapters import (
    ADAPTERS,
    Adapter,
    Tangent,
    TensorParallelPosition,
    adapter_for,
    position_of,
)
from megatron_dwm.model import LLM, MicroBatch, forward_backward
from megatron_dwm.runtime.profiling import phase


@dataclass
class _Samples:
    """The samples of the current micro-batch. The pass writes it and the hooks read it."""

    alignment_n: Tensor
    micro_batch_size: int
    first: int = field(default=0)

    def enter(self, micro_batch: int) -> None:
        self.first = micro_batch * self.micro_batch_size

    def current(self) -> Tensor:
        return self.alignment_n[self.first : self.first + self.micro_batch_size]


def tangent_probe(
    llm: LLM, micro_batches: list[MicroBatch], adapters: Mapping[str, Adapter] = ADAPTERS
) -> Tensor:
    """Returns <z, grad l_i> of every local sample, float32 [n], with z in the gradient buffers.

    `micro_batches` carry the unit objective. Costs one plain training step and one all-reduce of n
    floats over the inner group. Parameters and gradient buffers keep their values.
    """
    size = micro_batches[0].tokens_BS.shape[0]
    zeros_n = torch.zeros(len(micro_batches) * size, device=llm.runtime.device)
    samples = _Samples(zeros_n.requires_grad_(), size)
    with phase("tangent probe"), _frozen(llm), _hooked(llm, samples, adapters):
        forward_backward(llm, micro_batches, denominator=None, on_micro_batch=samples.enter)
    alignment_n = samples.alignment_n.grad
    assert alignment_n is not None
    dist.all_reduce(alignment_n, group=llm.runtime.inner_group)
    return alignment_n


@contextmanager
def _frozen(llm: LLM) -> Iterator[None]:
    parameters = llm.parameters()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _hooked(llm: LLM, samples: _Samples, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in llm.modules:
            for name, module in model.named_modules():
                if hook := _hook_for(name, module, llm, samples, adapters):
                    stack.callback(_attach(hook, module))
        yield


def _attach(hook: _Hook, module: Module) -> Callable[[], None]:
    """Probe the output of a module or of one of its methods; returns a function to undo it."""
    name = hook.adapter.method
    if not name:
        return module.register_forward_hook(hook, with_kwargs=True).remove
    upstream = getattr(module, name)

    def probed(*args: Any, **kwargs: Any) -> Any:
        return hook(module, args, kwargs, upstream(*args, **kwargs))

    setattr(module, name, probed)  # shadows the class's method
    return lambda: delattr(module, name)


def _hook_for(
    name: str, module: Module, llm: LLM, samples: _Samples, adapters: Mapping[str, Adapter]
) -> _Hook | None:
    """Returns the hook of a module.

    None for a module without parameters of its own, or if another rank counts its value.
    """
    adapter = adapter_for(module, adapters)
    if adapter is None:
        return None
    position = position_of(
        name,
        sequence_parallel=llm.transformer.sequence_parallel,
        tensor_rank=llm.runtime.tensor_rank,
        group=llm.runtime.tensor_group,
    )
    return _Hook(samples, adapter, position) if position.counts(adapter) else None


@dataclass(frozen=True)
class _Hook:
    """Torch's forward hook of one module, or of one of its methods."""

    samples: _Samples
    adapter: Adapter
    position: TensorParallelPosition

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not torch.is_grad_enabled():  # the first forward pass of activation recomputation
            return output
        kept = args[0] if args else kwargs[self.adapter.input_name]
        tangent = self.adapter.form(module, kwargs, self.position)
        if isinstance(output, tuple):
            return (self._probed(output[0], kept, tangent), *output[1:])
        return self._probed(output, kept, tangent)

    def _probed(self, output: Tensor, kept: Tensor, tangent: Tangent) -> Tensor:
        return _Identity.apply(output, self.samples.current(), kept, tangent)


class _Identity(torch.autograd.Function):
    """(output, alignment_B, ...) -> output; backward adds the tangent's values to `alignment_B`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _: Tensor, kept: Tensor, tangent: Tangent) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.tangent = tangent
        # `.data` shares the memory without being a view. Megatron's cross-entropy works in place on
        # logits and its pipeline schedule frees outputs; neither allows a view.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient, ctx.tangent(gradient, kept), None, None
