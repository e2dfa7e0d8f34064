"""Functions that the ranks of the bilevel tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.bilevel.slots import collect_slots
from megatron_dwm.bilevel.virtual_step import CLIP_EPSILON, prepare_virtual_step
from megatron_dwm.config import WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, ForwardOutputs, clear_gradients, forward_backward, forward_only
from megatron_dwm.model.optimizer_step import step_if_finite
from megatron_dwm.model.parameter_gather import gather_now
from megatron_dwm.model.passes.objective import token_count, token_mean, unit
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
from tests.tiny import MICRO_BATCH, SAMPLES, VOCAB_SIZE, Tiny, tiny
from tests.weighting.fixed_temperature import FixedTemperature
from tests.weighting.workers import learn, weigh

TRAIN, VALIDATION = 100, 101
DIFFERENCE_STEP = 1e-5
WEIGHTING_SHAPE = WeightingShape(
    vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_attention_heads=2, ffn_hidden_size=24
)


def alignments(
    inner: str = "adam", estimator: str = "tangent_probe", halves: bool = False, **layout: Any
) -> Tensor:
    """Returns the alignments of the global batch, in order, on every rank."""
    with tiny(**layout) as subject:
        options = {"halves": True} if halves else {}
        found = _hypergradient(subject, inner, estimator, **options)
        parts = [torch.zeros_like(found.alignment_n) for _ in range(subject.runtime.data_size)]
        dist.all_gather(parts, found.alignment_n, group=subject.runtime.data_group)
        return torch.cat(parts)


def problem_of(subject: Tiny, inner: str = "adam") -> Problem:
    """Returns the bi-level step that the tests take."""
    return Problem(
        llm=subject.llm,
        optimizer=subject.optimizer,
        train_batch=subject.batch(TRAIN),
        weights_n=subject.weights_n,
        val_batch=subject.batch(VALIDATION),
        micro_batch_size=MICRO_BATCH,
        inner=inner,
    )


def _hypergradient(
    subject: Tiny, inner: str, estimator: str = "tangent_probe", **options: Any
) -> Hypergradient:
    return ESTIMATORS[estimator](problem_of(subject, inner), **options)


def with_a_norm_in_a_tensor() -> list[tuple[Tensor, Any]]:
    """Alignments and norm, first as they are, then where the norm is a tensor of one element."""
    with tiny(clip=0.2) as subject:
        found = _hypergradient(subject, "adam")
        upstream = subject.optimizer.get_grad_norm
        subject.optimizer.get_grad_norm = lambda: torch.tensor([upstream()])
        both = (found, _hypergradient(subject, "adam"))
        return [(each.alignment_n, each.grad_norm) for each in both]


def everything_restored(**layout: Any) -> dict[str, bool]:
    """Returns which parts of the state are bit-identical after a hypergradient."""
    with tiny(**layout) as subject:
        gather_now(subject.llm)  # under the overlap, training leaves that to the next pass
        clear_gradients(subject.llm, subject.optimizer)
        before = _snapshot(subject)
        _hypergradient(subject, "adam")
        after = _snapshot(subject)
        return {
            part: all(torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True))
            for part in before
        }


def _snapshot(subject: Tiny) -> dict[str, list[Tensor]]:
    slots = collect_slots(subject.optimizer)
    state = [torch.as_tensor(v) for slot in slots for v in slot.state.values()]
    parameters = [p.detach() for p in subject.llm.parameters()]
    buffers = [p.main_grad for p in subject.llm.parameters()]
    parts = {
        "model parameters": parameters,
        "main parameters": [slot.main.detach() for slot in slots],
        "optimizer state": state,
        "gradient buffers": buffers,
        "random numbers": [torch.get_rng_state()],
        "still trainable": [torch.tensor(p.requires_grad) for p in subject.llm.parameters()],
    }
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in parts.items()}


def virtual_and_real(**layout: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns (virtual, real) parameters of this rank after a step on the same gradient."""
    with tiny(**layout) as subject:
        subject.gradient(TRAIN)
        step = prepare_virtual_step(subject.llm, subject.optimizer, "adam")
        step.enter()
        virtual = [p.detach().clone() for p in subject.llm.parameters()]
        step.restore()
        step_if_finite(subject.optimizer)
        gather_now(subject.llm)
        return list(zip(virtual, [p.detach() for p in subject.llm.parameters()], strict=True))


def alignments_and_oracle(inner: str, **layout: Any) -> tuple[Tensor, Tensor]:
    """Returns dL_val(theta')/dw: ours, and autograd's through a step in double precision.

    The second uses nothing of ours but the parameters and the moments: it builds per-sample
    gradients one by one from the model's logits, takes clipping and Adam by their textbook
    formulas as differentiable functions of w, and differentiates the validation loss.
    """
    with tiny(**layout) as subject:
        oracle = _oracle(subject, inner, layout.get("clip", 1.0))
        found = _hypergradient(subject, inner)
        return found.weight_gradient_n(problem_of(subject, inner)), oracle


def _oracle(subject: Tiny, inner: str, clip: float) -> Tensor:
    weights_n = subject.weights_n.double().requires_grad_()
    val_loss = _val_loss_after_step(subject, inner, clip)(weights_n)
    return torch.autograd.grad(val_loss, weights_n)[0]


def _val_loss_after_step(subject: Tiny, inner: str, clip: float) -> Callable[[Tensor], Tensor]:
    """Returns the function w -> L_val(theta'(w)) in double precision, differentiable in w."""
    module = subject.llm.modules[0]
    moments = _moments_by_name(subject)
    learning_rate = subject.optimizer.param_groups[0]["lr"]
    theta = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    train, validation = subject.batch(TRAIN), subject.batch(VALIDATION)
    losses = [_losses(module, theta, train.rows(i, i + 1))[0] for i in range(train.size)]
    gradients = [torch.autograd.grad(loss, list(theta.values())) for loss in losses]

    def val_loss(weights_n: Tensor) -> Tensor:
        mean = [
            sum(w * g for w, g in zip(weights_n, per_sample, strict=True)) / train.size
            for per_sample in zip(*gradients, strict=True)
        ]
        norm = torch.sqrt(sum((g * g).sum() for g in mean))
        factor = clip / (norm + CLIP_EPSILON) if clip and norm > clip else 1.0
        stepped = {
            name: _textbook_step(value.detach(), factor * g, moments[name], learning_rate, inner)
            for (name, value), g in zip(theta.items(), mean, strict=True)
        }
        counts = validation.loss_mask_BS.sum(dim=1)
        return (_losses(module, stepped, validation) * counts).sum() / counts.sum()

    return val_loss


def _textbook_step(
    theta: Tensor, update: Tensor, moments: tuple, learning_rate: float, inner: str
) -> Tensor:
    first, second, step, group = moments
    if inner == "adam":
        b1, b2 = group["betas"]
        m = b1 * first.double() + (1 - b1) * update
        v = b2 * second.double() + (1 - b2) * update**2
        t = step + 1
        # The square root has no derivative at 0, and the row of an unseen token stays there.
        root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
        update = (m / (1 - b1**t)) / (root / (1 - b2**t) ** 0.5 + group["eps"])
    return theta * (1 - learning_rate * group["weight_decay"]) - learning_rate * update


def _losses(module: torch.nn.Module, theta: dict[str, Tensor], batch: Any) -> Tensor:
    """Returns the token-mean loss of every sample in double precision, from logits."""
    inputs = (batch.tokens_BS, batch.position_ids_BS, None)
    logits = functional_call(module, theta, inputs)
    token_losses = F.cross_entropy(
        logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none"
    ).view_as(batch.labels_BS)
    return (token_losses * batch.loss_mask_BS).sum(dim=1) / batch.loss_mask_BS.sum(dim=1)


def _moments_by_name(subject: Tiny) -> dict[str, tuple]:
    slots = {id(slot.main): slot for slot in collect_slots(subject.optimizer)}
    return {
        name: (slot.state["exp_avg"], slot.state["exp_avg_sq"], int(slot.state["step"]), slot.group)
        for name, parameter in subject.llm.modules[0].named_parameters()
        for slot in [slots[id(parameter)]]
    }


def forward_values_unchanged() -> bool:
    """True if the probe's hooks do not change the loss of a pass and are gone afterwards."""
    with tiny() as subject:
        llm: LLM = subject.llm
        batch = subject.batch(VALIDATION)

        def loss() -> Tensor:
            clear_gradients(llm, subject.optimizer)
            passes = token_mean(batch, MICRO_BATCH)
            return forward_backward(llm, passes, denominator=token_count(batch)).loss_sums_n

        before = loss()
        _hypergradient(subject, "adam")
        return torch.equal(before, loss()) and not any(
            module._forward_hooks for module in llm.modules[0].modules()
        )


def refused(estimator: str, halves: bool = False, **layout: Any) -> str:
    """Returns the message with which an estimator refuses; empty if it does not refuse."""
    with tiny(**layout) as subject:
        try:
            _hypergradient(subject, "adam", estimator, **({"halves": True} if halves else {}))
        except ValueError as error:
            return str(error)
        return ""


def unroll_and_probe(inner: str, **layout: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns alignments of one problem by unroll, tangent probe and finite difference."""
    with tiny(**layout) as subject:
        return tuple(
            _hypergradient(subject, inner, name).alignment_n
            for name in ("unroll", "tangent_probe", "finite_difference")
        )


def halves_add_up(micro_batch: int = MICRO_BATCH, **layout: Any) -> tuple[Tensor, Tensor]:
    """Returns alignments with the validation batch: its halves' weighted sum, and the whole's."""
    with tiny(**layout) as subject:
        problem = replace(problem_of(subject), micro_batch_size=micro_batch)
        whole = ESTIMATORS["tangent_probe"](problem)
        found = ESTIMATORS["tangent_probe"](problem, halves=True)
        assert found.halves_2n is not None and found.halves_2n.shape == (2, len(whole.alignment_n))
        assert not torch.allclose(found.halves_2n[0], found.halves_2n[1])
        assert abs(found.val_loss - whole.val_loss) < 1e-5
        return found.alignment_n, whole.alignment_n


def _encoder_inputs(batch: Batch, outputs: ForwardOutputs, encoder: str) -> Tensor:
    """Returns the input of the weighting model's encoder, one row per sample."""
    if encoder == "own":
        return batch.tokens_BS
    return torch.cat([outputs.features.flat(), outputs.losses_n[:, None]], dim=1).double()


def _central_difference(
    model: torch.nn.Module, direction: list[Tensor], value: Callable[[], Tensor]
) -> float:
    """The derivative of `value` along a direction of the model's parameters, which stay."""
    values = []
    for sign in (1, -2):  # phi + h, then phi - h
        _move(model, direction, sign * DIFFERENCE_STEP)
        values.append(float(value()))
    _move(model, direction, DIFFERENCE_STEP)
    return (values[0] - values[1]) / (2 * DIFFERENCE_STEP)


def _move(model: torch.nn.Module, direction: list[Tensor], step: float) -> None:
    for parameter, v in zip(model.parameters(), direction, strict=True):
        parameter.data += step * v


def chain_and_difference(
    inner: str, encoder: str = "own", bound: float = 0.0, **layout: Any
) -> tuple[Tensor, Tensor]:
    """Returns dL_val(theta'(phi))/dphi along random directions: ours, and central differences.

    The differences are of the whole chain at the temperature of phi, in double precision.
    """
    with tiny(**layout) as subject:
        width = subject.llm.shape.hidden_size
        shape = replace(WEIGHTING_SHAPE, encoder=encoder, feature_size=width)
        model = build_weighting_model(shape, seed=2)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # away from uniform weights
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.double()
        config = WeightingConfig(
            group="global", standardize=False, clip_grad=0.0, min_effective_sample_size=bound
        )
        trainer = WeightingTrainer(model, config, subject.runtime, MICRO_BATCH, learned=True)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # form phi's gradient only
        method = Dwm(trainer)
        train = subject.batch(TRAIN)
        passes = unit(train, MICRO_BATCH)
        outputs = forward_only(subject.llm, passes, early_layer=1).outputs
        subject.weights_n = weigh(method, train, outputs)
        val_loss = _val_loss_after_step(subject, inner, layout.get("clip", 1.0))
        problem = problem_of(subject, inner)
        found = ESTIMATORS["tangent_probe"](problem)
        held = FixedTemperature(
            model,
            lambda: model.encoder(_encoder_inputs(train, outputs, encoder)),
            bound=bound,
            group=SAMPLES,
        )
        assert (float(held.temperature_G) > 1.0) == (bound > 0.0), "the bound is active"
        torch.testing.assert_close(held.weights(), subject.weights_n.double())
        alignment_n = found.alignment_n.double()
        learn(method, train, alignment_n, problem.learning_rate, outputs=outputs)
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        ours, differences = [], []
        for _ in range(4):
            direction = [
                torch.randn(p.shape, generator=generator, dtype=torch.float64)
                for p in model.parameters()
            ]
            pairs = zip(gradients, direction, strict=True)
            ours.append(float(sum((g * v).sum() for g, v in pairs)))
            differences.append(
                _central_difference(model, direction, lambda: val_loss(held.weights()))
            )
        return torch.tensor(ours), torch.tensor(differences)
