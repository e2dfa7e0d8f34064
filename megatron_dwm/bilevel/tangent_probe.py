"""Per-unit inner products <z, grad l_u> from one ordinary backward pass (METHOD.md, section 2).

Every parameter W enters its module linearly, f(a; W), so

    <z, grad l_u> = sum over modules and over the tokens t of unit u of <d_t, f(a_t; Z)>,

with d the gradient of the module's output and Z the slice of z that belongs to W. A hook applies a
function to each module's output that is the identity forward and adds those inner products to
`alignment_n` backward; it saves only what plain training saves, too. The parameters are frozen in
this pass, so no weight gradient is formed and the pass costs one plain training step: forward,
input gradients, and one product of a weight gradient's size. z is read from the gradient buffers.
adapters.py has the inner products of each module class. The same hooks can add to sketches of the
units' gradients (sketch.py), at the cost of one more product of a weight gradient's size.

Tensor parallel: a module whose weight is split gives each rank a partial sum. A module that every
rank holds whole (a norm) is counted on one rank, or on all ranks if each has its own part of the
input. Context parallel: every rank adds the tokens of its part of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
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
    class_name,
    position_of,
)
from megatron_dwm.bilevel.sketch import SketchPlan, UnitSketches
from megatron_dwm.bilevel.slots import SliceOfZ, slice_of_z
from megatron_dwm.bilevel.unit_gradients import FORMS
from megatron_dwm.model import LLM, MicroBatch, forward_backward
from megatron_dwm.model.parameter_gather import without_gathers
from megatron_dwm.model.passes.micro_batch import as_layers_take
from megatron_dwm.model.passes.units import Units
from megatron_dwm.runtime.profiling import phase


@dataclass
class _Current:
    """The units of the current micro-batch. The pass writes it and the hooks read it.

    probed: number of micro-batches, from the first, that are probed; others run without hooks.
    """

    alignment_n: Tensor
    units: list[Units]
    probed: int
    z_of: SliceOfZ = slice_of_z
    sketches: UnitSketches | None = None
    micro_batch: int = 0

    def __post_init__(self) -> None:
        counts = [units.count for units in self.units]
        self.firsts = list(accumulate(counts, initial=0))

    def enter(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    @property
    def is_probed(self) -> bool:
        return self.micro_batch < self.probed

    def place(self) -> tuple[Units, int]:
        """Returns the current units, and the number of the first of them in the pass."""
        return self.units[self.micro_batch], self.firsts[self.micro_batch]


@dataclass(frozen=True)
class Probed:
    """The result of one pass, on every rank of the replica.

    alignment_n: float32, <z, grad l_u>. sketch_nK: float32, sketches of grad l_u; None unless asked
    for.
    """

    alignment_n: Tensor
    sketch_nK: Tensor | None = None


def tangent_probe(
    llm: LLM, micro_batches: list[MicroBatch], adapters: Mapping[str, Adapter] = ADAPTERS
) -> Tensor:
    """Returns <z, grad l_u> of every local unit, float32 [n], with z in the gradient buffers.

    `micro_batches` carry the unit objective. Costs one plain training step and one all-reduce of n
    floats over the inner group. Parameters and gradient buffers keep their values.
    """
    return probe(llm, micro_batches, adapters=adapters).alignment_n


def probe(
    llm: LLM,
    micro_batches: list[MicroBatch],
    plan: SketchPlan | None = None,
    adapters: Mapping[str, Adapter] = ADAPTERS,
) -> Probed:
    """As `tangent_probe`; with a `plan` the same pass also sketches the units' gradients.

    The sketches cost one more product of a forward pass's size, and one all-reduce of n K floats.
    """
    current = _current(llm, micro_batches, probed=len(micro_batches))
    if plan is not None:
        current.sketches = plan.prepare(llm, len(current.alignment_n))
    with phase("tangent probe"), _frozen(llm), _hooked(llm, current, adapters):
        forward_backward(llm, micro_batches, denominator=None, on_micro_batch=current.enter)
    alignment_n, sketches = _summed(llm, current), current.sketches
    if sketches is None:
        return Probed(alignment_n)
    dist.all_reduce(sketches.values_nK, group=llm.runtime.inner_group)
    return Probed(alignment_n, sketches.values_nK)


class CarriedProbe:
    """The hooks of the probe inside a training pass, with z from elsewhere than its buffers.

    The pass forms its gradient as without them, bit for bit. It differentiates c_u l_u, not l_u, so
    the sums are c_u <z, grad l_u>. Cost: one product of a forward pass's size per probed
    micro-batch.
    """

    def __init__(
        self, llm: LLM, micro_batches: list[MicroBatch], z_of: SliceOfZ, *, probed: int
    ) -> None:
        """probed: number of micro-batches, from the first, that are probed."""
        self._llm = llm
        self._current = _current(llm, micro_batches, probed=probed, z_of=z_of)
        self.probed_n = torch.arange(len(self._current.alignment_n)) < self._current.firsts[probed]
        self.probed_n = self.probed_n.to(llm.runtime.device)
        """bool, the units of the probed micro-batches"""

    @contextmanager
    def attached(self) -> Iterator[Callable[[int], None]]:
        """Attach the hooks; gives the pass its `on_micro_batch`."""
        with _hooked(self._llm, self._current, ADAPTERS):
            yield self._current.enter

    def sums(self) -> Tensor:
        """Returns c_u <z, grad l_u> after the pass, float32 [n], 0 if not probed (collective)."""
        return _summed(self._llm, self._current)


def _current(
    llm: LLM, micro_batches: list[MicroBatch], *, probed: int, z_of: SliceOfZ = slice_of_z
) -> _Current:
    # In the form that the layers take, since the hooks see the layers' tokens.
    units = [batch.units for batch in as_layers_take(llm, micro_batches)]
    zeros_n = torch.zeros(sum(part.count for part in units), device=llm.runtime.device)
    return _Current(zeros_n.requires_grad_(), units, probed, z_of)


def _summed(llm: LLM, current: _Current) -> Tensor:
    """Returns the sums over the model's ranks; 0 if this rank counts no module (collective)."""
    alignment_n = current.alignment_n.grad
    if alignment_n is None:
        alignment_n = torch.zeros_like(current.alignment_n)
    dist.all_reduce(alignment_n, group=llm.runtime.inner_group)
    return alignment_n


@contextmanager
def _frozen(llm: LLM) -> Iterator[None]:
    parameters = llm.parameters()
    with without_gathers(llm):
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def _hooked(llm: LLM, current: _Current, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in llm.modules:
            for name, module in model.named_modules():
                if hook := _hook_for(name, module, llm, current, adapters):
                    stack.callback(_attach(hook, module))
        yield


def _attach(hook: _Hook, module: Module) -> Callable[[], None]:
    """Probe the output of a module or of one of its methods; returns a function to undo it."""
    name = hook.adapter.method
    if not name:
        return module.register_forward_hook(hook, with_kwargs=True).remove
    upstream, outer = getattr(module, name), vars(module).get(name)

    def probed(*args: Any, **kwargs: Any) -> Any:
        return hook(module, args, kwargs, upstream(*args, **kwargs))

    setattr(module, name, probed)  # shadows the class's method, or the hook of another direction
    if outer is None:
        return lambda: delattr(module, name)
    return lambda: setattr(module, name, outer)


def _hook_for(
    name: str, module: Module, llm: LLM, current: _Current, adapters: Mapping[str, Adapter]
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
        scaled_over=llm.runtime.tensor_context_group,
    )
    return _Hook(current, adapter, position) if position.counts(adapter) else None


@dataclass(frozen=True)
class _Hook:
    """Torch's forward hook of one module, or of one of its methods."""

    current: _Current
    adapter: Adapter
    position: TensorParallelPosition

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # Without gradients: the first forward pass of activation recomputation.
        if not (torch.is_grad_enabled() and self.current.is_probed):
            return output
        kept = args[0] if args else kwargs[self.adapter.input_name]
        backward = self._backward(module, kwargs)
        if isinstance(output, tuple):
            return (self._probed(output[0], kept, backward), *output[1:])
        return self._probed(output, kept, backward)

    def _probed(self, output: Tensor, kept: Tensor, backward: Tangent) -> Tensor:
        units, first = self.current.place()
        alignment_U = self.current.alignment_n[first : first + units.count]
        return _Identity.apply(output, alignment_U, kept, backward, units)

    def _backward(self, module: Module, kwargs: dict[str, Any]) -> Tangent:
        """Returns the tangent, which adds to the sketches when it is called, if there are some."""
        tangent = self.adapter.form(module, kwargs, self.position, self.current.z_of)
        sketches = self.current.sketches
        if sketches is None:
            return tangent
        add = FORMS[class_name(module)](module, kwargs, self.position)
        _, first = self.current.place()

        def both(gradient: Tensor, kept: Tensor, units: Units) -> Tensor:
            add(sketches, gradient, kept, units, first)
            return tangent(gradient, kept, units)

        return both


class _Identity(torch.autograd.Function):
    """(output, alignment_U, ...) -> output; backward adds the tangent's values to `alignment_U`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, _: Tensor, kept: Tensor, tangent: Tangent, units: Units
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.tangent, ctx.units = tangent, units
        # `.data` shares the memory without being a view. Megatron's cross-entropy works in place on
        # logits and its pipeline schedule frees outputs; neither allows a view.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient, ctx.tangent(gradient, kept, ctx.units), None, None, None
