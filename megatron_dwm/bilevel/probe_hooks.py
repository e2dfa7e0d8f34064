"""The hooks of the tangent probe on the modules of a model, and where their sums go.

tangent_probe.py says what they compute. Every module's output goes through a function that is the
identity forward; backward it adds the module's inner products to the alignments of the units at
hand. The pass tells the hooks which units these are.
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
    Adapter,
    Tangent,
    adapter_for,
    class_name,
)
from megatron_dwm.bilevel.position import TensorParallelPosition, position_of
from megatron_dwm.bilevel.sketch import UnitSketches
from megatron_dwm.bilevel.slots import SliceOfZ, slice_of_z
from megatron_dwm.bilevel.unit_gradients import FORMS
from megatron_dwm.model import WrappedModel
from megatron_dwm.model.parameter_gather import without_gathers
from megatron_dwm.model.passes.units import Units


@dataclass
class Current:
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
        """Note that the next modules run for this micro-batch, forward or backward."""
        self.micro_batch = micro_batch

    @property
    def is_probed(self) -> bool:
        """True if this micro-batch is among the probed ones."""
        return self.micro_batch < self.probed

    def place(self) -> tuple[Units, int]:
        """Returns the current units, and the number of the first of them in the pass."""
        return self.units[self.micro_batch], self.firsts[self.micro_batch]

    def alignment_U(self) -> Tensor:
        """Returns the zeros of the current units."""
        first = self.firsts[self.micro_batch]
        return self.alignment_n[first : first + self.units[self.micro_batch].count]


def summed(llm: WrappedModel, current: Current) -> Tensor:
    """Returns the sums over the model's ranks; 0 if this rank counts no module (collective)."""
    alignment_n = current.alignment_n.grad
    if alignment_n is None:
        alignment_n = torch.zeros_like(current.alignment_n)
    dist.all_reduce(alignment_n, group=llm.runtime.inner_group)
    return alignment_n


@contextmanager
def frozen(llm: WrappedModel) -> Iterator[None]:
    """Form no gradients of parameters during the context."""
    parameters = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    with without_gathers(llm):
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def hooked(llm: WrappedModel, current: Current, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Keep the hooks on the model's modules during the context.

    Raises NotImplementedError for a module with parameters that `adapters` does not know.
    """
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
    name: str, module: Module, llm: WrappedModel, current: Current, adapters: Mapping[str, Adapter]
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
    return _Hook(current, adapter, position) if adapter.counts_at(position) else None


@dataclass(frozen=True)
class _Hook:
    """Torch's forward hook of one module, or of one of its methods."""

    current: Current
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
        units, _ = self.current.place()
        return AddTangent.apply(output, self.current.alignment_U(), kept, backward, units)

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


class AddTangent(torch.autograd.Function):
    """(output, alignment_U, ...) -> output; backward adds the tangent's values to `alignment_U`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, alignment_U: Tensor, kept: Tensor, tangent: Tangent, units: Units
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.tangent, ctx.units, ctx.count = tangent, units, len(alignment_U)
        # `.data` shares the memory without being a view. Megatron's cross-entropy works in place on
        # logits and its pipeline schedule frees outputs; neither allows a view.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        values_U = ctx.tangent(gradient, kept, ctx.units)
        if len(values_U) != ctx.count:  # else autograd would sum them up
            raise RuntimeError(
                f"a micro-batch has {len(values_U)} samples, and the probe was told {ctx.count}"
            )
        return gradient, values_U, None, None, None
