"""What the ranks of the tests of encoding in chunks run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_dwm.config import ParallelConfig, WeightingConfig
from megatron_dwm.runtime import bring_up
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.model import WeightingModel, build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
from tests.weighting.workers import SAMPLES, SHAPE, alignment, batch, learn, weigh

LEARNING_RATE = 0.25
MICRO_BATCH = 3


def update_and_one_shot(
    group: str, bf16: bool = False, tensor: int = 1, context: int = 1
) -> dict[str, Any]:
    """phi's gradient of an update, the same written down for all samples of all replicas at once in
    fp32, how many samples each call of the encoder was handed: in the weights pass, and in the
    update; and the FLOPs of an update, as torch counts them, in those of a weights pass.
    """
    with bring_up(ParallelConfig(tensor=tensor, context=context), seed=0) as runtime:
        model = build_weighting_model(SHAPE, seed=3)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # the heads start at zero: leave that point
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        config = WeightingConfig(group=group, standardize=False, clip_grad=0.0)
        trainer = WeightingTrainer(model, config, runtime, MICRO_BATCH, learned=True, bf16=bf16)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # form the gradient only
        method = Dwm(trainer)
        calls: list[int] = []
        handle = model.encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        rows = batch(runtime, 5)
        with FlopCounterMode(display=False) as weighing:
            weigh(method, rows)
        num_calls = len(calls)
        with FlopCounterMode(display=False) as learning:
            learn(method, rows, alignment(rows.tokens_BS), LEARNING_RATE)
        found = _gradient(model)
        handle.remove()
        tokens_BS = batch(runtime, 5, whole=True).tokens_BS
        at_once = _gradient_at_once(model, config, tokens_BS)
        return {
            "gradient": found,
            "at once": at_once,
            "rows of weights": calls[:num_calls],
            "rows of update": calls[num_calls:],
            "flops": learning.get_total_flops() / weighing.get_total_flops(),
        }


def _gradient_at_once(model: WeightingModel, config: WeightingConfig, tokens_BS: Tensor) -> Tensor:
    model.zero_grad()
    size = SAMPLES if config.group == "global" else MICRO_BATCH
    pooled_GnD = model.encoder(tokens_BS).view(-1, size, SHAPE.hidden_size)
    weights_Gn = weights_from_logits(
        model.logits(pooled_GnD),
        min_effective_sample_size=config.min_effective_sample_size,
        uniform_floor=config.uniform_floor,
    )
    advantage_n = alignment(tokens_BS) * LEARNING_RATE
    (-(advantage_n * weights_Gn.flatten()).sum() / SAMPLES).backward()
    return _gradient(model)


def _gradient(model: WeightingModel) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
