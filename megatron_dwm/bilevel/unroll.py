"""The hypergradient by differentiating through the step itself: the reference for the others.

theta'(w) is computed as a function of w with its graph kept, and the validation loss is propagated
back to w. Costs the memory of two graphs and a backward pass through a backward pass. It is for
small models in one process: Megatron's tensor-parallel backward uses an all-reduce that autograd
does not record, so the result would be wrong without an error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_dwm.bilevel.objectives import TokenMean
from megatron_dwm.bilevel.problem import Hypergradient, Problem
from megatron_dwm.bilevel.slots import Slot, collect_slots
from megatron_dwm.bilevel.virtual_step import CLIP_EPSILON
from megatron_dwm.model.layers.local import RMSNorm
from megatron_dwm.model.passes.micro_batch import attention_borders
from megatron_dwm.model.passes.objective import TokenBatch, token_mean
from megatron_dwm.runtime.profiling import phase

Parameters = dict[str, Tensor]


@phase("unroll")
def unroll(problem: Problem, *, halves: bool = False) -> Hypergradient:
    """Returns the hypergradient of one process's samples; the LLM keeps its state.

    Raises ValueError for a layout or a model that it cannot differentiate exactly.
    """
    _refuse(problem, halves)
    theta = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in problem.llm.modules[0].named_parameters()
    }
    weights_n = problem.weights_n.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward has no derivative
        losses_n = _unit_losses(problem, theta, problem.train_batch)
        objective = problem.mean(weights_n * losses_n)
        gradients = torch.autograd.grad(objective, list(theta.values()), create_graph=True)
        stepped, norm = _step(problem, theta, gradients)
        val_loss = _token_mean(problem, stepped, problem.val_batch)
        (weight_gradient_n,) = torch.autograd.grad(val_loss, weights_n)
    return Hypergradient(
        alignment_n=_alignments(problem, weight_gradient_n),
        val_loss=float(val_loss.detach()),
        grad_norm=float(norm.detach()),
    )


def _alignments(problem: Problem, weight_gradient_n: Tensor) -> Tensor:
    """Returns s_u from dL_val/dw_u = -eta * (share of u) * s_u."""
    if problem.train_batch.units.sizes_U is None:
        return weight_gradient_n * (-len(weight_gradient_n) / problem.learning_rate)
    share_n = problem.shares()
    # A unit without a counted token has no share, so its alignment is 0.
    return torch.where(share_n > 0, weight_gradient_n / (share_n * -problem.learning_rate), 0.0)


def _refuse(problem: Problem, halves: bool) -> None:
    runtime = problem.llm.runtime
    if runtime.world_size > 1:
        raise ValueError(
            "bilevel.estimator unroll: runs in one process (autograd does not record "
            f"Megatron's collectives), got {runtime.world_size}; use tangent_probe"
        )
    if problem.llm.is_quantized or problem.llm.transformer.params_dtype != torch.float32:
        raise ValueError(
            "bilevel.estimator unroll: needs model.precision fp32 without FP8; use tangent_probe"
        )
    if problem.llm.transformer.recompute_granularity is not None:
        raise ValueError(
            "bilevel.estimator unroll: recomputation has no second derivative; set "
            "model.recompute none or use tangent_probe"
        )
    if not isinstance(problem.objective, TokenMean):
        raise ValueError(
            "bilevel.estimator unroll: supports the token mean only; use tangent_probe"
        )
    if problem.sketch_size is not None:
        raise ValueError("bilevel.estimator unroll: forms no sketches; use tangent_probe")
    if halves:
        raise ValueError("bilevel.estimator unroll: measures no signal-to-noise; use tangent_probe")
    if not any(isinstance(module, RMSNorm) for module in problem.llm.modules[0].modules()):
        raise ValueError(
            "bilevel.estimator unroll: fused layers are not twice differentiable; use tangent_probe"
        )


def _unit_losses(problem: Problem, theta: Parameters, batch: TokenBatch) -> Tensor:
    """Returns token-mean losses, [n], from logits: Megatron's cross-entropy works in place."""
    counts_n = batch.units.sum_of_rows(batch.loss_mask_BS).clamp(min=1.0)
    return batch.units.sum_of_rows(_masked_losses(problem, theta, batch)) / counts_n


def _token_mean(problem: Problem, theta: Parameters, batch: TokenBatch) -> Tensor:
    rows_B = _masked_losses(problem, theta, batch).sum(dim=1)
    return rows_B.sum() / batch.loss_mask_BS.sum()


def _masked_losses(problem: Problem, theta: Parameters, batch: TokenBatch) -> Tensor:
    """Returns [B, S], 0 for a token that does not count."""
    (micro_batch,) = token_mean(batch, len(batch.tokens_BS))
    logits = functional_call(
        problem.llm.modules[0],
        theta,
        (batch.tokens_BS, batch.position_ids_BS, None),
        {"packed_seq_params": attention_borders(problem.llm, micro_batch)},
    )
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
    return losses.view_as(batch.labels_BS) * batch.loss_mask_BS


def _step(
    problem: Problem, theta: Parameters, gradients: tuple[Tensor, ...]
) -> tuple[Parameters, Tensor]:
    """Returns theta'(w) and |g|."""
    slots = {id(slot.main): slot for slot in collect_slots(problem.optimizer)}
    names = dict(problem.llm.modules[0].named_parameters())
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    clip = problem.optimizer.config.clip_grad
    active = clip > 0.0 and float(norm.detach()) + CLIP_EPSILON > clip
    factor = clip / (norm + CLIP_EPSILON) if active else 1.0
    stepped = {
        name: _stepped(problem, slots[id(names[name])], theta[name].detach(), factor * gradient)
        for name, gradient in zip(theta, gradients, strict=True)
    }
    return stepped, norm


def _stepped(problem: Problem, slot: Slot, theta: Tensor, gradient: Tensor) -> Tensor:
    eta, decay = slot.group["lr"], slot.group["weight_decay"]
    if problem.inner == "sgd":
        return theta * (1 - eta * decay) - eta * gradient
    moments = slot.moments()
    first = moments.beta1 * moments.first + (1 - moments.beta1) * gradient
    second = moments.beta2 * moments.second + (1 - moments.beta2) * gradient.square()
    # A square root has no derivative at 0, and the row of an unseen token stays there.
    root = torch.where(second > 0, torch.where(second > 0, second, 1.0).sqrt(), 0.0)
    corrected = root / moments.correction2**0.5 + moments.epsilon
    return theta * (1 - eta * decay) - eta * (first / moments.correction1) / corrected
