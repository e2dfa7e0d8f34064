"""The tiny LLM of megatron_dwm.testing, mid-training, for tests of the passes and of bilevel/."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dwm.config import ParallelConfig, TrainingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM
from megatron_dwm.model.optimizer_step import step_if_finite
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.testing import (
    SEQUENCE_LENGTH,
    TINY_TRAINING,
    VOCAB_SIZE,
    random_batch,
    replica_rows,
    tiny_learner,
    weighted_gradient,
)
from megatron_dwm.training.optimizer import begin_at

__all__ = ["MICRO_BATCH", "SAMPLES", "SEQUENCE_LENGTH", "VOCAB_SIZE", "Tiny", "tiny"]

SAMPLES = 8
MICRO_BATCH = 2


@dataclass
class Tiny:
    """What a test works on. The weights are far from uniform, the losses of unequal length."""

    runtime: Runtime
    llm: LLM
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    weights_n: torch.Tensor

    def batch(self, number: int) -> Batch:
        """This replica's rows of batch `number`, the same global batch under every layout."""
        return random_batch(number, self.runtime, rows=SAMPLES, uncounted=0.2)

    def gradient(self, number: int) -> None:
        """Write the weighted gradient of a batch into the gradient buffers."""
        batch = self.batch(number)
        weighted_gradient(self.llm, self.optimizer, batch, self.weights_n, MICRO_BATCH)

    def train(self, steps: int) -> None:
        """Take real optimizer steps, so that the moments are not empty."""
        for number in range(steps):
            self.gradient(number)
            step_if_finite(self.optimizer)
            self.scheduler.step(increment=1)


@contextmanager
def tiny(**arguments: Any) -> Iterator[Tiny]:
    """One of `tinies`."""
    with tinies(1, **arguments) as (subject,):
        yield subject


@contextmanager
def tinies(
    count: int,
    *,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    virtual_stages: int = 1,
    sequence: bool = False,
    sharded: bool = False,
    switches: dict[str, Any] | None = None,
    clip: float = 1.0,
    tied: bool = True,
    query_groups: int = 2,
    layers: int = 2,
    steps: int = 4,
    rounding_seed: int | None = None,
    **model: Any,
) -> Iterator[list[Tiny]]:
    """Equal tiny models under a layout, each after `steps` training steps.

    rounding_seed: change each first parameter by one fp32 unit in the last place, up or down at
    random: what then changes in a result is rounding.
    switches: other keys of the section `parallel`. model: other keys of the model's section, such
        as precision.
    """
    parallel = ParallelConfig(
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual_stages=virtual_stages,
        sequence=sequence,
        sharded_optimizer=sharded,
        **(switches or {}),
    )
    training = replace(TINY_TRAINING, clip_grad=clip)
    model |= {"tied_embeddings": tied, "num_query_groups": query_groups, "num_layers": layers}
    with bring_up(parallel, seed=1) as runtime:
        yield [
            _trained(runtime, parallel, training, model, steps, rounding_seed) for _ in range(count)
        ]


def _trained(
    runtime: Runtime,
    parallel: ParallelConfig,
    training: TrainingConfig,
    model: dict[str, Any],
    steps: int,
    rounding_seed: int | None,
) -> Tiny:
    built = tiny_learner(runtime, parallel=parallel, training=training, **model)
    if rounding_seed is not None:
        _round_otherwise(built.llm, rounding_seed)
    # The first step, at rate 0, only fills the moments. Adam's first step is the gradient's sign,
    # which makes whole steps of the rounding errors by which layouts differ.
    begin_at(built.scheduler, 0)
    weights_n = torch.linspace(0.2, 1.8, SAMPLES)[replica_rows(runtime, SAMPLES)]
    subject = Tiny(
        runtime, built.llm, built.optimizer, built.scheduler, weights_n.to(runtime.device)
    )
    subject.train(steps)
    return subject


@torch.no_grad()
def _round_otherwise(llm: LLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in llm.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1.0 + signs * torch.finfo(torch.float32).eps)
