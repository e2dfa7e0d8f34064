"""What the ranks of the weighting tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.config import ParallelConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.weighting import DwmPolicy
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from tests.weighting.fixed_temperature import FixedTemperature

SAMPLES, LENGTH, VOCAB = 12, 8, 50
SHAPE = WeightingShape(
    vocab_size=VOCAB, hidden_size=16, num_layers=1, num_attention_heads=2, ffn_hidden_size=24
)


def batch(runtime: Runtime, number: int, *, whole: bool = False) -> Batch:
    """This replica's rows of a global batch that is the same under every layout, or all of it."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator)
    share = SAMPLES if whole else SAMPLES // runtime.data_size
    first = 0 if whole else runtime.data_rank * share
    return Batch(
        tokens_BS=tokens,
        labels_BS=tokens,
        loss_mask_BS=torch.ones(SAMPLES, LENGTH),
        position_ids_BS=torch.arange(LENGTH).repeat(SAMPLES, 1),
        sample_ids_B=torch.arange(SAMPLES),
        document_ids_B=torch.arange(SAMPLES),
        domains=("d",) * SAMPLES,
    ).rows(first, first + share)


def alignment(tokens_BS: Tensor) -> Tensor:
    """A signal that the model can learn from the tokens."""
    return (tokens_BS < VOCAB // 4).float().mean(dim=1) * 1e-4


def weights_after_updates(
    group: str, updates: int, tensor: int = 1, pipeline: int = 1
) -> dict[str, Tensor]:
    """Weights of a fixed global batch before and after updates, and the model's parameters."""
    with bring_up(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0) as runtime:
        policy = DwmPolicy(
            build_weighting_model(SHAPE, seed=3),
            WeightingConfig(group=group, learning_rate=3e-3),
            runtime,
            micro_batch_size=3,
        )
        probe = batch(runtime, 999)
        before = gather(runtime, policy.weights(probe))
        for number in range(updates):
            rows = batch(runtime, number)
            policy.update(rows, None, alignment(rows.tokens_BS), learning_rate=1.0)
        flat = torch.cat([p.detach().reshape(-1) for p in policy.model.parameters()])
        return {
            "before": before,
            "after": gather(runtime, policy.weights(probe)),
            "signal": gather(runtime, alignment(probe.tokens_BS)),
            "parameters": flat,
        }


def moved_by_an_update(damp: bool, signal_to_noise: float) -> Tensor:
    """How far one update moves phi."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        model = build_weighting_model(SHAPE, seed=3)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        config = WeightingConfig(damp_by_noise=damp, learning_rate=1e-3)
        policy = DwmPolicy(model, config, runtime, micro_batch_size=3)
        policy.trust(signal_to_noise)
        rows = batch(runtime, 1)
        policy.update(rows, None, alignment(rows.tokens_BS), learning_rate=1.0)
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def gather(runtime: Runtime, rows_n: Tensor) -> Tensor:
    """Rows of every replica in global order."""
    whole = rows_n.new_empty(len(rows_n) * runtime.data_size)
    dist.all_gather_into_tensor(whole, rows_n.contiguous(), group=runtime.data_group)
    return whole


def gradient_and_difference(standardize: bool, group: str) -> tuple[Tensor, Tensor]:
    """phi's gradient along random directions: what an update forms, and central differences of
    -(1/n) sum_i a_i w_i(phi) at the temperatures of phi, with a_i computed by hand, in double
    precision.
    """
    with bring_up(ParallelConfig(), seed=0) as runtime:
        config = WeightingConfig(group=group, standardize=standardize, clip_grad=0.0)
        model = build_weighting_model(SHAPE, seed=3)
        policy = DwmPolicy(model, config, runtime, micro_batch_size=3)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # the heads start at zero: leave that point
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.double()
        policy.learned = True
        rows = batch(runtime, 5)
        signal_n = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        size = SAMPLES if group == "global" else 3
        weights_Gn = policy.weights(rows).view(-1, size)
        s_Gn = signal_n.view(-1, size)
        if standardize:
            centred = s_Gn - (s_Gn * weights_Gn).mean(-1, keepdim=True)
            advantage_Gn = centred / s_Gn.std(-1, keepdim=True, correction=0)
        else:
            advantage_Gn = s_Gn * 0.25

        held = FixedTemperature(
            model,
            lambda: model.encoder(rows.tokens_BS),
            bound=config.min_effective_sample_size,
            group=size,
        )
        assert float(held.temperature_G.max()) > 1.0, "the bound is active"
        torch.testing.assert_close(held.weights(), weights_Gn.flatten())

        def objective() -> float:
            return float(-(advantage_Gn * held.weights().view(-1, size)).sum() / SAMPLES)

        directions = [
            [
                torch.randn(p.shape, generator=generator, dtype=torch.float64)
                for p in model.parameters()
            ]
            for _ in range(3)
        ]
        differences = [_central_difference(model, d, objective) for d in directions]
        policy.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.0
        )  # keep phi, form its gradient
        policy.update(rows, None, signal_n, learning_rate=0.25)
        found = [
            float(sum((p.grad * v).sum() for p, v in zip(model.parameters(), d, strict=True)))
            for d in directions
        ]
        return torch.tensor(found), torch.tensor(differences)


def _central_difference(model: torch.nn.Module, direction: list[Tensor], objective: Any) -> float:
    h = 1e-6
    values = []
    for sign in (1, -2):  # theta + h, then theta - h
        for parameter, step in zip(model.parameters(), direction, strict=True):
            parameter.data += sign * h * step
        values.append(objective())
    for parameter, step in zip(model.parameters(), direction, strict=True):
        parameter.data += h * step
    return (values[0] - values[1]) / (2 * h)
