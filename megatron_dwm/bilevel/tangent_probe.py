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
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel.adapters import ADAPTERS, Adapter
from megatron_dwm.bilevel.probe_hooks import Current, frozen, hooked, summed
from megatron_dwm.bilevel.sketch import SketchPlan
from megatron_dwm.bilevel.slots import SliceOfZ, slice_of_z
from megatron_dwm.model import LLM, MicroBatch, forward_backward
from megatron_dwm.model.passes.micro_batch import as_layers_take
from megatron_dwm.runtime.profiling import phase


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
    with phase("tangent probe"), frozen(llm), hooked(llm, current, adapters):
        forward_backward(llm, micro_batches, denominator=None, on_micro_batch=current.enter)
    alignment_n, sketches = summed(llm, current), current.sketches
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
        with hooked(self._llm, self._current, ADAPTERS):
            yield self._current.enter

    def sums(self) -> Tensor:
        """Returns c_u <z, grad l_u> after the pass, float32 [n], 0 if not probed (collective)."""
        return summed(self._llm, self._current)


def _current(
    llm: LLM, micro_batches: list[MicroBatch], *, probed: int, z_of: SliceOfZ = slice_of_z
) -> Current:
    # In the form that the layers take, since the hooks see the layers' tokens.
    units = [batch.units for batch in as_layers_take(llm, micro_batches)]
    zeros_n = torch.zeros(sum(part.count for part in units), device=llm.runtime.device)
    return Current(zeros_n.requires_grad_(), units, probed, z_of)
