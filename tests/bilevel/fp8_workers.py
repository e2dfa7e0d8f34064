"""Functions that the ranks of the FP8 tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from megatron_dwm.bilevel import ESTIMATORS
from megatron_dwm.bilevel.adapters import ADAPTERS
from megatron_dwm.bilevel.slots import collect_slots
from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.bilevel.virtual_step import prepare_virtual_step
from megatron_dwm.model import clear_gradients, forward_backward, forward_only
from megatron_dwm.model.layers.fp8_emulation import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_dwm.model.passes.objective import token_count, token_mean, unit
from tests.bilevel.workers import TRAIN, VALIDATION, problem_of
from tests.tiny import MICRO_BATCH, Tiny, tiny

EMULATED = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)
# Relative sizes of a parameter step along z: at one end the loss is no longer linear, at the other
# the rounding of fp32 losses hides the step.
DIFFERENCE_STEPS = [10.0**-k for k in range(1, 8)]


def leave_validation_gradient(subject: Tiny) -> None:
    """Write z of a plain descent step, grad L_val, into the gradient buffers."""
    clear_gradients(subject.llm, subject.optimizer)
    batch = subject.batch(VALIDATION)
    passes = token_mean(batch, MICRO_BATCH)
    forward_backward(subject.llm, passes, denominator=token_count(batch))


def probe_and_reference(**layout: Any) -> tuple[Tensor, Tensor]:
    """Returns alignments of single samples: the probe's, and <z, grad l_i> in double precision.

    The reference is plain autograd through rounding that passes gradients straight through.
    """
    with tiny(fp8_emulation=True, **layout) as subject:
        leave_validation_gradient(subject)
        batch = subject.batch(TRAIN)
        found = tangent_probe(subject.llm, unit(batch, 1))
        module = subject.llm.modules[0]
        z = {name: p.main_grad.double() for name, p in module.named_parameters()}
        theta = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
        emulated = [child for child in module.modules() if isinstance(child, EMULATED)]
        assert len(emulated) == 4 * layout.get("layers", 2)
        for child in emulated:
            child._forward_impl = _straight_through_linear
        expected = []
        for row in range(batch.size):
            loss = _token_mean_loss(module, theta, batch.rows(row, row + 1))
            gradients = torch.autograd.grad(loss, list(theta.values()))
            pairs = zip(z.values(), gradients, strict=True)
            expected.append(sum((a * b).sum() for a, b in pairs))
        return found, torch.stack(expected)


def _straight_through_linear(input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    output = F.linear(_rounded(input, torch.float8_e4m3fn), _rounded(weight, torch.float8_e4m3fn))
    output.register_hook(lambda gradient: _rounded(gradient, torch.float8_e5m2))
    return output


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor` on the grid of an FP8 format scaled to its range; keeps its gradient."""
    stretch = torch.finfo(dtype).max / tensor.detach().abs().max()
    on_grid = (tensor.detach() * stretch).to(dtype).to(tensor.dtype) / stretch
    return tensor + (on_grid - tensor.detach())


def _token_mean_loss(module: Module, theta: dict[str, Tensor], batch: Any) -> Tensor:
    logits = functional_call(module, theta, (batch.tokens_BS, batch.position_ids_BS, None))
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
    mask = batch.loss_mask_BS.flatten()
    return (losses * mask).sum() / mask.sum()


def probe_and_layer_gradients(**layout: Any) -> tuple[float, float]:
    """Returns sum_i <z, grad l_i> from the probe, and <z, g> with g from a training pass."""
    with tiny(fp8_emulation=True, **layout) as subject:
        batch = subject.batch(TRAIN)
        leave_validation_gradient(subject)
        z = [p.main_grad.clone() for p in subject.llm.parameters()]
        probed = tangent_probe(subject.llm, unit(batch, MICRO_BATCH)).sum()
        clear_gradients(subject.llm, subject.optimizer)
        forward_backward(subject.llm, unit(batch, MICRO_BATCH), denominator=1.0)
        pairs = zip(z, subject.llm.parameters(), strict=True)
        return float(probed), float(sum((a * p.main_grad).sum() for a, p in pairs))


def rounded_and_unrounded_tangents() -> tuple[Tensor, Tensor]:
    """Returns alignments in a quantized model, with and without rounding in the tangent's product.

    Without it is the case of Transformer Engine's layers.
    """
    with tiny(fp8_emulation=True, steps=40) as subject:
        leave_validation_gradient(subject)
        passes = unit(subject.batch(TRAIN), MICRO_BATCH)
        plain = {
            f"{kind.__module__}.{kind.__qualname__}": ADAPTERS[
                f"{base.__module__}.{base.__qualname__}"
            ]
            for kind in EMULATED
            for base in kind.__bases__
        }
        rounded = tangent_probe(subject.llm, passes)
        return rounded, tangent_probe(subject.llm, passes, {**ADAPTERS, **plain})


def probe_and_differences(fp8_emulation: bool) -> tuple[Tensor, list[Tensor]]:
    """Returns alignments from the probe, and from a central difference of every step size."""
    with tiny(fp8_emulation=fp8_emulation) as subject:
        llm, passes = subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH)
        leave_validation_gradient(subject)
        probed = tangent_probe(llm, passes)
        theta = [p.detach().clone() for p in llm.parameters()]
        z = [p.main_grad.clone() for p in llm.parameters()]
        ratio = _norm(theta) / _norm(z)

        def losses(step: float) -> Tensor:
            with torch.no_grad():
                for parameter, value, direction in zip(llm.parameters(), theta, z, strict=True):
                    parameter.copy_(value + step * direction)
            return forward_only(llm, passes).unit_losses_n.double()

        differences = [
            (losses(h * ratio) - losses(-h * ratio)) / (2 * h * ratio) for h in DIFFERENCE_STEPS
        ]
        return probed, differences


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)


def alignments_in_fp32_and_fp8(steps: int, **layout: Any) -> tuple[Tensor, Tensor]:
    """Returns alignments (Adam's inner step) of one trained model in fp32 and in emulated FP8."""
    with tiny(steps=steps, **layout) as subject:
        exact = ESTIMATORS["tangent_probe"](problem_of(subject)).alignment_n
        state = _optimizer_state(subject)
    with tiny(steps=1, fp8_emulation=True, **layout) as subject:
        for slot, (value, moments, step) in zip(
            collect_slots(subject.optimizer), state, strict=True
        ):
            slot.main.data.copy_(value)
            for name, moment in moments.items():
                slot.state[name].copy_(moment)
            slot.state["step"].fill_(step)
            slot.group["lr"] = subject.optimizer.param_groups[0]["lr"]
        return exact, ESTIMATORS["tangent_probe"](problem_of(subject)).alignment_n


def _optimizer_state(subject: Tiny) -> list[tuple[Tensor, dict[str, Tensor], float]]:
    return [
        (
            slot.main.detach().clone(),
            {name: slot.state[name].clone() for name in ("exp_avg", "exp_avg_sq")},
            float(slot.state["step"]),
        )
        for slot in collect_slots(subject.optimizer)
    ]


def caches_invalidated() -> list[bool]:
    """Returns True for each move after which modules have to quantize their weights again.

    The moves are the virtual step and its reversal. The flag is that of Transformer Engine's
    modules.
    """
    with tiny() as subject:
        llm = subject.llm
        llm.transformer.fp8 = "hybrid"  # Megatron-Core's own method reads this
        for module in llm.modules[0].modules():
            if hasattr(module, "weight"):
                module.is_first_microbatch = True
        subject.gradient(TRAIN)
        step = prepare_virtual_step(llm, subject.optimizer, "adam")
        found = []
        for move in (step.enter, step.restore):
            flagged = [m for m in llm.modules[0].modules() if hasattr(m, "is_first_microbatch")]
            for module in flagged:
                module.is_first_microbatch = False
            move()
            found += [bool(flagged), all(module.is_first_microbatch for module in flagged)]
        return found
