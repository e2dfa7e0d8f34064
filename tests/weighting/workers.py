"""What the ranks of the weighting tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import ParallelConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.weighting import Alignments, Method
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.model import WeightingModel, WeightingShape, build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
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
        document_ids_U=torch.arange(SAMPLES),
        domains=("d",) * SAMPLES,
    ).rows(first, first + share)


def dwm(model: WeightingModel, config: WeightingConfig, runtime: Runtime, size: int = 3) -> Dwm:
    """The method with micro-batches of `size`."""
    return Dwm(WeightingTrainer(model, config, runtime, size))


def weigh(method: Method, rows: Batch, outputs: ForwardOutputs | None = None) -> Tensor:
    """The method's weights of `rows`."""
    return method.weights(rows, outputs, TrainState())


def learn(
    method: Method,
    rows: Batch,
    alignment_n: Tensor,
    learning_rate: float = 1.0,
    *,
    outputs: ForwardOutputs | None = None,
    signal_to_noise: float | None = None,
) -> None:
    """One update of the method from these alignments."""
    found = Alignments(
        values_n=alignment_n, learning_rate=learning_rate, signal_to_noise=signal_to_noise
    )
    method.update(rows, outputs or ForwardOutputs(losses_n=torch.zeros(rows.size)), found)


def alignment(tokens_BS: Tensor) -> Tensor:
    """A signal that the model can learn from the tokens."""
    return (tokens_BS < VOCAB // 4).float().mean(dim=1) * 1e-4


def weights_after_updates(
    group: str, updates: int, tensor: int = 1, context: int = 1, pipeline: int = 1
) -> dict[str, Tensor]:
    """Weights of a fixed global batch before and after updates, and the model's parameters."""
    with bring_up(
        ParallelConfig(tensor=tensor, context=context, pipeline=pipeline), seed=0
    ) as runtime:
        config = WeightingConfig(group=group, learning_rate=3e-3)
        method = dwm(build_weighting_model(SHAPE, seed=3), config, runtime)
        probe = batch(runtime, 999)
        before = gather(runtime, weigh(method, probe))
        for number in range(updates):
            rows = batch(runtime, number)
            learn(method, rows, alignment(rows.tokens_BS))
        flat = torch.cat([p.detach().reshape(-1) for p in method.trainer.model.parameters()])
        return {
            "before": before,
            "after": gather(runtime, weigh(method, probe)),
            "signal": gather(runtime, alignment(probe.tokens_BS)),
            "parameters": flat,
        }


def moved_by_an_update(damp: bool, signal_to_noise: float) -> Tensor:
    """How far one update moves phi."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        model = build_weighting_model(SHAPE, seed=3)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        config = WeightingConfig(damp_by_noise=damp, learning_rate=1e-3)
        rows = batch(runtime, 1)
        method = dwm(model, config, runtime)
        learn(method, rows, alignment(rows.tokens_BS), signal_to_noise=signal_to_noise)
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
        method = dwm(model, config, runtime)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # the heads start at zero: leave that point
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.double()
        method.trainer.learned = True
        rows = batch(runtime, 5)
        signal_n = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        size = SAMPLES if group == "global" else 3
        weights_Gn = weigh(method, rows).view(-1, size)
        s_Gn = signal_n.view(-1, size)
        if standardize:
            centered = s_Gn - (s_Gn * weights_Gn).mean(-1, keepdim=True)
            advantage_Gn = centered / s_Gn.std(-1, keepdim=True, correction=0)
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
        # Keep phi, form its gradient.
        method.trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        learn(method, rows, signal_n, 0.25)
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
