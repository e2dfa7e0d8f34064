"""The hypergradient of the validation loss with respect to sample weights (METHOD.md, section 2).

    g(w)   = (1/n) sum_i w_i grad l_i(theta)             one forward and backward pass
    theta' = theta - eta * u(g(w))                       virtual_step.py
    z      = J^T grad L_val(theta')                      one forward and backward pass
    s_i    = <z, grad l_i(theta)>                        one pass of an estimator
    dL_val(theta')/dw_i = -(eta/n) * s_i

There is no second derivative, because w enters the gradient linearly and theta does not depend on
it. Cost with the tangent probe: three plain training steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_dwm.bilevel.finite_difference import finite_difference
from megatron_dwm.bilevel.problem import Hypergradient, Problem, Target, sum_over_data
from megatron_dwm.bilevel.sketch import SketchPlan
from megatron_dwm.bilevel.tangent_probe import Probed, probe, tangent_probe
from megatron_dwm.bilevel.unroll import unroll
from megatron_dwm.bilevel.virtual_step import VirtualStep, kept_scales, prepare_virtual_step
from megatron_dwm.model import LLM, MicroBatch, clear_gradients, forward_backward
from megatron_dwm.model.passes.micro_batches import largest_micro_batch
from megatron_dwm.model.passes.objective import (
    TokenBatch,
    unit,
    weighted,
    weighted_denominator,
)
from megatron_dwm.runtime.profiling import phase

# (llm with z in its gradient buffers, micro-batches of the unit objective) -> <z, grad l_i>, [n]
InnerProducts = Callable[[LLM, list[MicroBatch]], Tensor]


def first_order(
    problem: Problem, *, halves: bool = False, inner_products: InnerProducts
) -> Hypergradient:
    """Returns the hypergradient from first-order passes, with a pass of its own for g(w).

    Afterwards the LLM and its optimizer are bit for bit as before, with the scales of the delayed
    FP8 recipe, and the gradient buffers are zero. halves: see `from_gradient`.
    """
    train = weighted(problem.train_batch, problem.weights_n, problem.micro_batch_size)
    clear_gradients(problem.llm, problem.optimizer)
    denominator = weighted_denominator(problem.train_batch)
    with kept_scales(problem.llm):
        forward_backward(problem.llm, train, denominator=denominator)
        found = from_gradient(problem, halves=halves, inner_products=inner_products)
    clear_gradients(problem.llm, problem.optimizer)
    return found


def from_gradient(
    problem: Problem, *, halves: bool = False, inner_products: InnerProducts
) -> Hypergradient:
    """Returns the hypergradient from g(w) in the gradient buffers, at the cost of two plain steps.

    Afterwards g(w) is in the gradient buffers again. theta and the moments are the current ones;
    theta' is the result of the optimizer's own `step()` on this g(w). If training then takes that
    step, it continues from theta'.

    halves: also return the alignments of each half of the validation batch, at the cost of one more
    pass of `inner_products`. Their weighted sum is the whole's, because z is linear in the
    validation gradient.

    Raises ValueError if the problem asks for sketches and `inner_products` has none.
    """
    llm, optimizer = problem.llm, problem.optimizer
    with phase("virtual step"):
        step = prepare_virtual_step(llm, optimizer, problem.inner)
    plan = _sketch_plan(problem, step, inner_products)
    found: list[tuple[Tensor, Probed]] = []
    for part in validation_parts(problem, halves):
        with phase("virtual step"):
            step.enter()
        with phase("validation gradient"):
            clear_gradients(llm, optimizer)
            loss_and_count = validation_gradient(problem, part)
        with phase("direction"):
            step.direction()
        with phase("restore"):
            step.restore()
        passes = unit(problem.train_batch, problem.micro_batch_size)
        sketches = plan is not None and not found
        probed = probe(llm, passes, plan) if sketches else Probed(inner_products(llm, passes))
        found.append((loss_and_count, probed))
    with phase("restore"):
        step.restore_gradient()
    losses_and_counts = torch.stack([pair for pair, _ in found])
    parts_Kn = torch.stack([probed.alignment_n for _, probed in found])
    share_K = losses_and_counts[:, 1] / losses_and_counts[:, 1].sum()
    return Hypergradient(
        alignment_n=(share_K[:, None] * parts_Kn).sum(dim=0),
        val_loss=float((share_K * losses_and_counts[:, 0]).sum()),
        grad_norm=step.grad_norm,
        halves_2n=parts_Kn if halves else None,
        sketch_nK=found[0][1].sketch_nK,
    )


def _sketch_plan(
    problem: Problem, step: VirtualStep, inner_products: InnerProducts
) -> SketchPlan | None:
    if problem.sketch_size is None:
        return None
    if inner_products is not tangent_probe:
        raise ValueError("sketches of gradients: only bilevel.estimator tangent_probe forms them")
    return SketchPlan(size=problem.sketch_size, factors=step.jacobian())


def validation_parts(target: Target, halves: bool) -> list[TokenBatch]:
    """Returns the validation batch, whole or as its even and its odd rows.

    These are the even and odd rows of the global batch under every layout, because each rank has an
    even number of rows (model/passes/micro_batches.py).
    """
    rows = target.val_batch.tokens_BS.shape[0]
    if not halves:
        return [target.val_batch]
    assert rows % 2 == 0, "every rank has as many even rows as odd rows"
    return [target.val_batch.rows(0, rows, 2), target.val_batch.rows(1, rows, 2)]


def validation_gradient(target: Target, batch: TokenBatch) -> Tensor:
    """Add grad L_val to the gradient buffers; returns float64 [L_val, divisor] (collective)."""
    llm, objective = target.llm, target.objective
    rows = batch.tokens_BS.shape[0]
    size = largest_micro_batch(rows, target.micro_batch_size, llm.micro_batches_multiple)
    micro_batches = objective.micro_batches(batch, size)
    result = forward_backward(llm, micro_batches, denominator=objective.denominator(batch))
    loss_sum, count = sum_over_data(llm, objective.sums(result))
    return torch.stack([loss_sum / count, count])


INNER_PRODUCTS: dict[str, InnerProducts] = {
    "tangent_probe": tangent_probe,
    "finite_difference": finite_difference,
}


# Each of these runs its own pass for g(w).
ESTIMATORS: dict[str, Callable[..., Hypergradient]] = {
    **{
        name: partial(first_order, inner_products=function)
        for name, function in INNER_PRODUCTS.items()
    },
    "unroll": unroll,
}


def hypergradient(problem: Problem, estimator: str, *, halves: bool = False) -> Hypergradient:
    """`from_gradient` by the name of an estimator; unroll runs its own passes and keeps g(w)."""
    if estimator == "unroll":
        return unroll(problem, halves=halves)
    return from_gradient(problem, halves=halves, inner_products=INNER_PRODUCTS[estimator])
