"""The direction first: an update for half a step, inside the training pass (METHOD.md, section 9).

    h_t = grad L_val(theta_t)              a pass of the validation batch, before the training pass
    z_t = J_0 h_t                          from the moments that stand (frozen.py)
    s_u = <z_t, grad l_u(theta_t)>         hooks of the tangent probe in the training pass itself

theta_t is the theta' of the step before, so this is the exact hypergradient with theta' one step
earlier, and J without its dependence on the step's own gradient (and so without clipping). The
training pass differentiates c_u l_u, with c_u the weight times the size of the unit; the sums are
divided by c_u. A unit of weight 0 has no gradient in that pass, so its alignment is not known.

Cost: a training pass of the validation batch, and one product of a forward pass's size for every
micro-batch that is probed. Memory: z in a buffer of its own, since the pass needs the gradient
buffers; no copy of the gradient or of the parameters. The weighted gradient is bit for bit that of
a pass without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel.frozen import frozen_direction
from megatron_dwm.bilevel.hypergradient import validation_parts
from megatron_dwm.bilevel.problem import Hypergradient, Target
from megatron_dwm.bilevel.slots import slice_of_z
from megatron_dwm.bilevel.tangent_probe import CarriedProbe
from megatron_dwm.bilevel.virtual_step import kept_scales
from megatron_dwm.model import LLM, MicroBatch, clear_gradients
from megatron_dwm.model.passes.micro_batches import probed_micro_batches
from megatron_dwm.model.passes.objective import TokenBatch

# The pass sums c_u <z, grad l_u>. From a smaller weight than this, little of l_u is left in it.
SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Direction:
    """z of this rank's parameters, by the parameter's id.

    val_loss: L_val(theta) of the passages. count: their number of counted tokens.
    """

    slices: dict[int, Tensor]
    val_loss: float
    count: float

    def slice_of(self, parameter: Any) -> Tensor:
        """Returns the slice of z that belongs to a model parameter."""
        return self.slices[id(parameter)]


def directions_ahead(
    target: Target, dtype: torch.dtype = torch.float32, *, halves: bool = False
) -> list[Direction]:
    """Returns z at the parameters and moments that stand, kept as `dtype` (collective).

    halves: one for each half of the validation batch; else one for all of it.
    The gradient buffers are zero afterwards; all else keeps its value.
    """
    with kept_scales(target.llm):
        found = [_direction(target, part, dtype) for part in validation_parts(target, halves)]
    clear_gradients(target.llm, target.optimizer)
    return found


def _direction(target: Target, passages: TokenBatch, dtype: torch.dtype) -> Direction:
    val_loss, count = frozen_direction(target, passages).tolist()
    slices = {id(p): slice_of_z(p).to(dtype, copy=True) for p in target.llm.parameters()}
    return Direction(slices=slices, val_loss=val_loss, count=count)


class AheadProbe:
    """Computes the alignments of a training pass along directions that are known before it."""

    def __init__(self, llm: LLM, directions: list[Direction], *, fraction: float = 1.0) -> None:
        """directions: of the whole validation batch, or of both halves.

        fraction: of the micro-batches that are probed, from the first.
        """
        self._llm, self._directions, self._fraction = llm, directions, fraction
        self._probes: list[CarriedProbe] = []

    @contextmanager
    def attached(self, micro_batches: list[MicroBatch]) -> Iterator[Callable[[int], None]]:
        """Attach the hooks to the LLM for one pass, which calls the given `on_micro_batch`."""
        probed = probed_micro_batches(len(micro_batches), self._fraction)
        self._probes = [
            CarriedProbe(self._llm, micro_batches, direction.slice_of, probed=probed)
            for direction in self._directions
        ]
        with ExitStack() as stack:
            notified = [stack.enter_context(probe.attached()) for probe in self._probes]

            def enter(micro_batch: int) -> None:
                for notify in notified:
                    notify(micro_batch)

            yield enter

    def hypergradient(self, batch: TokenBatch, weights_n: Tensor) -> Hypergradient:
        """Returns the alignments after the pass (collective).

        batch, weights_n: what the pass trained on, and the weights in its objective.
        """
        assert self._probes, "the training pass comes first"
        sizes_U = batch.units.sizes_U
        factor_n = weights_n * (batch.tokens_BS.shape[1] if sizes_U is None else sizes_U)
        known_n = self._probes[0].probed_n & (weights_n > SMALLEST_WEIGHT)
        divides_n = known_n & (factor_n > 0)
        parts_Kn = torch.stack(
            [torch.where(divides_n, probe.sums() / factor_n, 0.0) for probe in self._probes]
        )
        counts_K = torch.tensor([direction.count for direction in self._directions])
        share_K = counts_K.to(parts_Kn) / counts_K.sum()
        losses_K = torch.tensor([direction.val_loss for direction in self._directions])
        return Hypergradient(
            alignment_n=(share_K[:, None] * parts_Kn).sum(dim=0),
            val_loss=float((share_K.cpu() * losses_K).sum()),
            grad_norm=None,
            known_n=known_n,
            halves_2n=parts_Kn if len(parts_Kn) == 2 else None,
        )
