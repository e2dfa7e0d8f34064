"""A very small LLM with its optimizer, mid-training, for tests of the passes and of bilevel/."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm, clear_gradients, forward_backward, resolve_shape
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.training.optimiser import begin_at, build_optimizer, build_scheduler

VOCAB_SIZE = 256
SEQUENCE_LENGTH = 16
SAMPLES = 8
MICRO_BATCH = 2
SEED = 5


@dataclass
class Tiny:
    """What a test works on. The weights are far from uniform, the losses of unequal length."""

    runtime: Runtime
    llm: LLM
    optimizer: ChainedOptimizer
    scheduler: object
    weights_n: torch.Tensor

    def batch(self, number: int) -> Batch:
        """This replica's rows of batch `number`, the same global batch under every layout."""
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, VOCAB_SIZE, (SAMPLES, SEQUENCE_LENGTH + 1), generator=generator)
        mask = (torch.rand(SAMPLES, SEQUENCE_LENGTH, generator=generator) > 0.2).float()
        whole = Batch(
            tokens_BS=text[:, :-1].contiguous(),
            labels_BS=text[:, 1:].contiguous(),
            loss_mask_BS=mask,
            position_ids_BS=torch.arange(SEQUENCE_LENGTH).repeat(SAMPLES, 1),
            sample_ids_B=torch.arange(SAMPLES),
            document_ids_B=torch.arange(SAMPLES),
            domains=("d",) * SAMPLES,
        )
        return whole.rows(*self._rows()).to(self.runtime.device)

    def _rows(self) -> tuple[int, int]:
        share = SAMPLES // self.runtime.data_size
        return self.runtime.data_rank * share, (self.runtime.data_rank + 1) * share

    def gradient(self, number: int) -> None:
        """Leave the weighted gradient of a batch in the gradient buffers."""
        clear_gradients(self.llm, self.optimizer)
        batch = self.batch(number)
        micro_batches = weighted(batch, self.weights_n, MICRO_BATCH)
        forward_backward(self.llm, micro_batches, denominator=weighted_denominator(batch))

    def train(self, steps: int) -> None:
        """Real optimizer steps, so that the moments are not empty."""
        for number in range(steps):
            self.gradient(number)
            self.optimizer.step()
            self.scheduler.step(increment=1)


@contextmanager
def tiny(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_stages: int = 1,
    sequence: bool = False,
    sharded: bool = False,
    precision: str = "fp32",
    fp8_emulation: bool = False,
    fp8_recipe: str = "tensorwise",
    fp8_first_last_bf16: bool = False,
    recompute: str = "none",
    clip: float = 1.0,
    tied: bool = True,
    query_groups: int = 2,
    layers: int = 2,
    steps: int = 4,
    rounding_seed: int | None = None,
) -> Iterator[Tiny]:
    """A tiny model under a layout, after `steps` training steps.

    rounding_seed: round the first parameters another way, each up or down by one fp32 unit in the
    last place at random: what a result depends on then is rounding.
    """
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_stages=virtual_stages,
        sequence=sequence,
        sharded_optimizer=sharded,
    )
    model = ModelConfig(
        precision=precision,
        fp8_emulation=fp8_emulation,
        fp8_recipe=fp8_recipe,
        fp8_first_last_bf16=fp8_first_last_bf16,
        recompute=recompute,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=layers,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=query_groups,
        tied_embeddings=tied,
    )
    training = TrainingConfig(steps=20, learning_rate=3e-3, clip_grad=clip, warmup_fraction=0.1)
    with bring_up(parallel, seed=1) as runtime:
        shape = resolve_shape(model)
        llm = build_llm(shape, model, parallel, runtime, sequence_length=SEQUENCE_LENGTH, seed=SEED)
        if rounding_seed is not None:
            _round_otherwise(llm, rounding_seed)
        optimizer = build_optimizer(training, llm, sharded=sharded)
        scheduler = build_scheduler(training, optimizer)
        # The first step, at rate 0, only fills the moments. Adam's first step is the gradient's
        # sign, which makes whole steps of the rounding errors by which layouts differ.
        begin_at(scheduler, 0)
        subject = Tiny(runtime, llm, optimizer, scheduler, _weights(runtime))
        subject.train(steps)
        yield subject


def _weights(runtime: Runtime) -> torch.Tensor:
    """This replica's part of weights far from uniform, mean 1."""
    share = SAMPLES // runtime.data_size
    weights_n = torch.linspace(0.2, 1.8, SAMPLES).split(share)[runtime.data_rank]
    return weights_n.to(runtime.device)


@torch.no_grad()
def _round_otherwise(llm: LLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in llm.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1.0 + signs * torch.finfo(torch.float32).eps)
