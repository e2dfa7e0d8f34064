"""Per-sample inner products <z, grad l_i> from one ordinary backward pass (METHOD.md, section 2).

Every parameter W enters its module linearly, f(a; W), so

    <z, grad l_i> = sum over modules and over the tokens t of sample i of <d_t, f(a_t; Z)>,

with d the gradient of the module's output and Z the slice of z that belongs to W. A hook hands
each module's output through a function that is the identity forward and adds those inner products
to `alignment_n` backward; it saves only what plain training saves too. The parameters are frozen
meanwhile, so no weight gradient is formed and the pass costs one plain training step: forward,
input gradients, and one product of a weight gradient's size. z is read from `main_grad`.

Tensor parallel: a module whose weight is split gives each rank a partial sum; a replicated one (a
norm) is counted on one rank, or on all where each holds another part of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.model import LLM, MicroBatch, forward_backward
from megatron_dwm.model.modules import RMSNorm

# (output gradient, kept input, z) -> [B]; pure tensor arithmetic of one module class.
Tangent = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Samples:
    """Which samples the tokens that now pass belong to. Written by the pass, read by the hooks."""

    alignment_n: Tensor
    micro_batch_size: int
    first: int = field(default=0)

    def enter(self, micro_batch: int) -> None:
        self.first = micro_batch * self.micro_batch_size

    def current(self) -> Tensor:
        return self.alignment_n[self.first : self.first + self.micro_batch_size]


def tangent_probe(llm: LLM, micro_batches: list[MicroBatch]) -> Tensor:
    """float32 [n]: <z, grad l_i> of every local sample, with z in the gradient buffers.

    `micro_batches` carry the unit objective. Costs one plain training step and one all-reduce of n
    floats over the inner group. Parameters and gradient buffers are left as they are.
    """
    size = micro_batches[0].tokens_BS.shape[0]
    zeros_n = torch.zeros(len(micro_batches) * size, device=llm.runtime.device)
    samples = _Samples(zeros_n.requires_grad_(), size)
    with _frozen(llm), _hooked(llm, samples):
        forward_backward(llm, micro_batches, denominator=None, on_micro_batch=samples.enter)
    alignment_n = samples.alignment_n.grad
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
def _hooked(llm: LLM, samples: _Samples) -> Iterator[None]:
    with ExitStack() as stack:
        for model in llm.modules:
            for module in model.modules():
                if hook := _hook_for(module, llm, samples):
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
        yield


def _hook_for(module: Module, llm: LLM, samples: _Samples) -> Callable[..., Any] | None:
    """The hook of a module that uses a parameter; None for one that only holds others.

    Raises NotImplementedError for a module class without an adapter: a parameter that was left
    out would make every alignment wrong.
    """
    sequence_parallel = llm.transformer.sequence_parallel
    if isinstance(module, ColumnParallelLinear):
        return _LinearHook(samples, gather_input=sequence_parallel, gather_gradient=False)
    if isinstance(module, RowParallelLinear):
        return _LinearHook(samples, gather_input=False, gather_gradient=sequence_parallel)
    if isinstance(module, VocabParallelEmbedding):
        return _EmbeddingHook(samples)
    if isinstance(module, RMSNorm):
        counted = sequence_parallel or llm.runtime.tensor_rank == 0
        return _NormHook(samples) if counted else None
    if any(True for _ in module.parameters(recurse=False)):
        raise NotImplementedError(f"the tangent probe has no adapter for {type(module).__name__}")
    return None


@dataclass(frozen=True)
class _LinearHook:
    """sum_t <d_t, Z a_t> of x -> W x, computed as (d Z) * a: the size of an input gradient.

    Under sequence parallelism a column-parallel layer gathers its input, and a row-parallel one
    scatters its output, over the tensor-parallel group: the backward pass gathers the same.
    """

    samples: _Samples
    gather_input: bool
    gather_gradient: bool

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        tied = kwargs.get("weight")  # a tied output layer is handed the embedding's
        weight = module.weight if tied is None else tied
        kept = args[0] if args else kwargs["input_"]

        def tangent(gradient: Tensor, kept: Tensor, z: Tensor) -> Tensor:
            if self.gather_input:
                kept = _gather_sequence(kept, module.tp_group)
            if self.gather_gradient:
                gradient = _gather_sequence(gradient, module.tp_group)
            product_SBD = gradient.matmul(z.to(gradient.dtype)) * kept
            return product_SBD.sum(dim=(0, 2), dtype=torch.float32)

        return (_probe(output[0], kept, weight, tangent, self.samples), *output[1:])


@dataclass(frozen=True)
class _EmbeddingHook:
    """sum_t <d_t, Z[token_t]> over the rows of the vocabulary that this rank holds."""

    samples: _Samples

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        first, last = module.vocab_start_index, module.vocab_end_index

        def tangent(gradient: Tensor, tokens_BS: Tensor, z: Tensor) -> Tensor:
            if module.reduce_scatter_embeddings:
                gradient = _gather_sequence(gradient, module.tp_group).transpose(0, 1)
            here_BS = (tokens_BS >= first) & (tokens_BS < last)
            rows_BSD = F.embedding((tokens_BS - first).where(here_BS, 0), z)
            return ((gradient * rows_BSD).sum(dim=2, dtype=torch.float32) * here_BS).sum(dim=1)

        tokens_BS = args[0] if args else kwargs["input_"]
        return _probe(output, tokens_BS, module.weight, tangent, self.samples)


@dataclass(frozen=True)
class _NormHook:
    """sum_t <d_t, z * x_t / rms(x_t)>; the normalised input is recomputed."""

    samples: _Samples

    def __call__(
        self, module: RMSNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        def tangent(gradient: Tensor, kept_SBD: Tensor, z: Tensor) -> Tensor:
            normed_SBD = F.rms_norm(kept_SBD, z.shape, None, module.epsilon)
            return (gradient * normed_SBD * z).sum(dim=(0, 2), dtype=torch.float32)

        kept_SBD = args[0] if args else kwargs["hidden_SBD"]
        return _probe(output, kept_SBD, module.weight, tangent, self.samples)


def _probe(
    output: Tensor, kept: Tensor, weight: Parameter, tangent: Tangent, samples: _Samples
) -> Tensor:
    if not torch.is_grad_enabled():  # the first forward pass of activation recomputation
        return output
    return _Identity.apply(output, samples.current(), kept, weight.main_grad, tangent)


class _Identity(torch.autograd.Function):
    """Identity in `output`; backward adds the tangent's inner products to `alignment_B`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, alignment_B: Tensor, kept: Tensor, z: Tensor, tangent: Tangent
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.z, ctx.tangent = z, tangent
        # `.data` shares the memory without being a view: Megatron's cross-entropy works in place
        # on logits, and its pipeline schedule frees outputs, neither of which allows a view.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient, ctx.tangent(gradient, kept, ctx.z), None, None, None


def _gather_sequence(part_SBD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / tensor size, B, D] -> [S, B, D], the parts in rank order."""
    part_SBD = part_SBD.contiguous()
    whole_SBD = part_SBD.new_empty(part_SBD.shape[0] * group.size(), *part_SBD.shape[1:])
    dist.all_gather_into_tensor(whole_SBD, part_SBD, group=group)
    return whole_SBD
