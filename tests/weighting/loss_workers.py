"""What the ranks of the tests of loss_reweighting run."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import ParallelConfig, PolicyConfig, WeightingConfig
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.weighting.loss_reweighting import LossReweighting
from tests.weighting.workers import SAMPLES, batch, weigh

DECAY, TEMPERATURE, MICRO_BATCH = 0.8, 0.7, 3


def losses_of(number: int) -> Tensor:
    """Losses of a global batch."""
    return 1.0 + 4.0 * torch.rand(SAMPLES, generator=torch.Generator().manual_seed(number))


def _method(runtime: Runtime, group: str) -> LossReweighting:
    return LossReweighting(
        PolicyConfig(loss_decay=DECAY, loss_temperature=TEMPERATURE),
        WeightingConfig(group=group, min_effective_sample_size=0.0),
        runtime,
        MICRO_BATCH,
    )


def weights_and_by_hand(group: str) -> dict[str, Tensor]:
    """Weights after three steps: ours, by hand, and those of a method that loaded the state."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        share = SAMPLES // runtime.data_size
        mine = slice(runtime.data_rank * share, (runtime.data_rank + 1) * share)
        method, rows = _method(runtime, group), batch(runtime, 0)
        first = weigh(method, rows)
        mean = square = 0.0
        for number in range(3):
            losses = losses_of(number)
            method.after_step(rows, losses[mine], TrainState())
            kept = DECAY if number else 0.0
            mean = kept * mean + (1 - kept) * float(losses.double().mean())
            square = kept * square + (1 - kept) * float(losses.double().square().mean())
        losses = losses_of(3)
        outputs = ForwardOutputs(losses_n=losses[mine])
        size = SAMPLES if group == "global" else MICRO_BATCH
        logits = (losses.double() - mean) / (square - mean**2) ** 0.5 / TEMPERATURE
        by_hand = torch.softmax(logits.view(-1, size), dim=1).flatten() * size
        again = _method(runtime, group)
        again.load_state_dict(method.state_dict())
        return {
            "first": first,
            "ours": weigh(method, rows, outputs),
            "by hand": by_hand[mine].float(),
            "after loading": weigh(again, rows, outputs),
        }


def after_a_broken_batch() -> tuple[bool, bool]:
    """Whether the batch after one with a loss that is not finite is read first, and the next."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        method, rows = _method(runtime, "global"), batch(runtime, 0)
        method.after_step(rows, losses_of(0), TrainState())
        broken = losses_of(1)
        broken[2] = float("nan")
        weigh(method, rows, ForwardOutputs(losses_n=broken))
        second = method.needs(TrainState()).whole_batch
        weigh(method, rows, ForwardOutputs(losses_n=losses_of(2)))
        return second, method.needs(TrainState()).whole_batch


def needs_after_an_older_checkpoint() -> bool:
    """Whether the next batch is read first after loading a state without a temperature."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        method, rows = _method(runtime, "global"), batch(runtime, 0)
        for number in range(2):
            weigh(method, rows, ForwardOutputs(losses_n=losses_of(number)))
            method.after_step(rows, losses_of(number), TrainState())
        assert method.needs(TrainState()).relative
        method.load_state_dict({"moments": method.state_dict()["moments"]})
        return method.needs(TrainState()).whole_batch


def weights_of_equal_losses() -> Tensor:
    """Weights of losses that are all the same, as they were before."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        method = _method(runtime, "micro_batch")
        losses = torch.full((SAMPLES,), 2.0)
        rows = batch(runtime, 0)
        method.after_step(rows, losses, TrainState())
        return weigh(method, rows, ForwardOutputs(losses_n=losses))
