"""Alignments with the optimizer's state frozen: the direction is known before any training pass.

    h   = grad L_val(theta)                                  at the parameters that stand
    J_0 = (1-b1)/c1 / (sqrt(V_0)+eps),  V_0 = v_0 / (1-b2^t)  from the moments after t steps
    z   = J_0 h,    s_u = <z, grad l_u(theta)>

This is section 2 of METHOD.md with theta' one step earlier, and J without its dependence on the
gradient: the form in which OPUS (arXiv 2602.05400) scores candidates. J_0 is 0 where V_0 is 0: no
gradient has reached that parameter, so the moments say nothing about it. Cost: a training pass of
the validation batch, and one plain training step of the units; no gradient of theirs is needed, no
step and no copy of the parameters. With sketches it keeps a copy of J_0.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel.adam import AdamMoments
from megatron_dwm.bilevel.hypergradient import validation_gradient
from megatron_dwm.bilevel.problem import InnerOptimizer, Problem, Target
from megatron_dwm.bilevel.sketch import SketchPlan
from megatron_dwm.bilevel.slots import (
    collect_slots,
    publish_gradients,
    slice_of_z,
)
from megatron_dwm.bilevel.tangent_probe import Probed, probe
from megatron_dwm.bilevel.virtual_step import kept_scales
from megatron_dwm.model import WrappedModel, clear_gradients
from megatron_dwm.model.passes.objective import TokenBatch, unit
from megatron_dwm.runtime.profiling import phase


def frozen_jacobian(moments: AdamMoments) -> Tensor:
    """Returns J_0 of one tensor; all 0 before the first step."""
    root = (moments.second / max(1 - moments.beta2**moments.step, 1e-30)).sqrt_()
    largest = (1 - moments.beta1) / moments.correction1
    return torch.where(root > 0, largest / (root + moments.epsilon), 0.0)


def frozen_alignments(problem: Problem) -> Probed:
    """Returns s_u of this rank's units, and sketches of J_0 grad l_u if the problem asks for them.

    A collective call. The problem's weights are not read. The gradient buffers are zero afterwards;
    parameters and moments keep their values.
    """
    llm = problem.llm
    plan = None
    if problem.sketch_size is not None:
        plan = SketchPlan(size=problem.sketch_size, factors=_factors(problem))
    with kept_scales(llm):
        frozen_direction(problem, problem.val_batch)
        probed = probe(llm, unit(problem.train_batch, problem.micro_batch_size), plan)
    clear_gradients(llm, problem.optimizer)
    return probed


def frozen_direction(target: Target, passages: TokenBatch) -> Tensor:
    """Compute z into the gradient buffers, on every rank (collective).

    Returns float64 [2]: L_val(theta) of the passages and its divisor.
    """
    clear_gradients(target.llm, target.optimizer)
    with phase("validation gradient"):
        loss_and_count = validation_gradient(target, passages)
    with phase("direction"), torch.no_grad():
        multiply_by_frozen_jacobian(target.llm, target.optimizer, target.inner)
    return loss_and_count


@torch.no_grad()
def _factors(problem: Problem) -> dict[int, Tensor]:
    """Returns J_0 of this rank's parameters, by id; the gradient buffers are overwritten."""
    clear_gradients(problem.llm, problem.optimizer)
    problem.optimizer.prepare_grads()
    for slot in collect_slots(problem.optimizer):
        slot.gradient.fill_(1.0)
    _multiply(problem.llm, problem.optimizer, problem.inner)
    return {id(p): slice_of_z(p).to(torch.float32, copy=True) for p in problem.llm.parameters()}


@torch.no_grad()
def multiply_by_frozen_jacobian(
    model: WrappedModel, optimizer: ChainedOptimizer, inner: InnerOptimizer
) -> None:
    """Turn the gradient in the gradient buffers into z = J_0 h, on every rank (collective)."""
    optimizer.prepare_grads()
    _multiply(model, optimizer, inner)


def _multiply(model: WrappedModel, optimizer: ChainedOptimizer, inner: InnerOptimizer) -> None:
    slots = collect_slots(optimizer)
    if inner == "adam":
        for slot in slots:
            slot.gradient.mul_(frozen_jacobian(slot.moments()))
    publish_gradients(model, optimizer, slots)
