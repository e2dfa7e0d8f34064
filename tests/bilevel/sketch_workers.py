"""What the ranks of the tests of sketched gradients run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel.coordinates import Numbering, element_numbers, named_parameters
from megatron_dwm.bilevel.sketch import SketchPlan
from megatron_dwm.bilevel.tangent_probe import probe, tangent_probe
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from tests.bilevel.unit_workers import _theta
from tests.bilevel.workers import TRAIN, _losses
from tests.documents import document_losses, packed_batch
from tests.tiny import MICRO_BATCH, Tiny, tiny


def _batch(subject: Tiny, units: str) -> Batch:
    if units == "rows":
        return subject.batch(TRAIN)
    return packed_batch(TRAIN, subject.runtime, unit=units, uncounted=0.2)


def _factor(name: str, whole: Tensor) -> Tensor:
    """Returns factors of a whole parameter that are far from equal."""
    numbers = torch.arange(whole.numel(), dtype=torch.float64).view(whole.shape)
    return (1.5 + torch.sin(numbers * (1 + len(name) % 7))).to(whole.dtype)


def _factors(llm: LLM) -> dict[int, Tensor]:
    """Returns this rank's part of the factors, cut as the parameters are."""
    found = {}
    for name, parameter in named_parameters(llm):
        first, size = Numbering(llm.shape).first(name)
        whole = _factor(name, torch.empty(size)).flatten()
        found[id(parameter)] = whole[element_numbers(llm, name, parameter) - first]
    return found


def sketches(
    size: int, units: str = "rows", weighed: bool = False, flattened: bool = False, **layout: Any
) -> dict[str, Tensor]:
    """Returns the sketches of the global batch's units, in order, on every rank.

    And whether alignments of the same pass are bit for bit those of the plain probe.
    """
    with tiny(**layout) as subject:
        batch = _batch(subject, units)
        passes = unit(batch, MICRO_BATCH)
        if flattened:
            passes = [each.flattened() for each in passes]
        subject.gradient(TRAIN + 1)  # any direction
        factors = _factors(subject.llm) if weighed else None
        before = [p.main_grad.clone() for p in subject.llm.parameters()]
        found = probe(subject.llm, passes, SketchPlan(size=size, factors=factors))
        assert found.sketch_nK is not None
        after = [p.main_grad for p in subject.llm.parameters()]
        assert all(map(torch.equal, before, after)), "the pass leaves gradient buffers alone"
        counts = units_of_replicas(batch, subject.runtime)
        return {
            "sketches": gather_over_data(found.sketch_nK, subject.runtime, counts),
            "alignments are the probe's": torch.equal(
                found.alignment_n, tangent_probe(subject.llm, passes)
            ),
        }


def gram_by_hand(units: str = "rows", weighed: bool = False, **model: Any) -> Tensor:
    """Returns [n, n]: inner products of autograd's gradients of each unit, in double precision."""
    with tiny(**model) as subject:
        theta, batch = _theta(subject), _batch(subject, units)
        if units == "rows":
            module = subject.llm.modules[0]
            losses_U = torch.cat(
                [_losses(module, theta, batch.rows(i, i + 1)) for i in range(batch.size)]
            )
        else:
            losses_U = document_losses(subject.llm.shape, theta, batch)
        rows = []
        for loss in losses_U:
            gradients = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
            named = zip(theta, gradients, strict=True)
            rows.append(
                torch.cat([((_factor(n, g) if weighed else 1) * g).flatten() for n, g in named])
            )
        gradients_UN = torch.stack(rows)
        return gradients_UN @ gradients_UN.t()


def along_z(**layout: Any) -> tuple[Tensor, Tensor]:
    """Returns the products of z and exact sketches, and the probe's <z, grad l_u>, on each rank."""
    with tiny(**layout) as subject:
        llm, passes = subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH)
        subject.gradient(TRAIN + 1)  # z
        found = probe(llm, passes, SketchPlan(size=0))
        assert found.sketch_nK is not None
        z = torch.zeros(found.sketch_nK.shape[1])
        for name, parameter in named_parameters(llm):
            z[element_numbers(llm, name, parameter)] = parameter.main_grad
        # Ranks have different parts of z, and those that both have are equal.
        counts = (z != 0).float()
        for tensor in (z, counts):
            dist.all_reduce(tensor, group=llm.runtime.inner_group)
        z /= counts.clamp(min=1.0)
        return found.sketch_nK.double() @ z.double(), found.alignment_n


def over_seeds(size: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Returns Gram matrices [seeds, n, n] of sketches, and the exact one, of one process."""
    with tiny() as subject:
        passes = unit(subject.batch(TRAIN), MICRO_BATCH)
        subject.gradient(TRAIN)
        found = []
        for plan in [SketchPlan(size=size, seed=seed) for seed in range(seeds)]:
            sketch_nK = probe(subject.llm, passes, plan).sketch_nK
            assert sketch_nK is not None
            found.append(sketch_nK.double() @ sketch_nK.double().t())
        exact_nK = probe(subject.llm, passes, SketchPlan(size=0)).sketch_nK
        assert exact_nK is not None
        return torch.stack(found), exact_nK.double() @ exact_nK.double().t()
