"""Sizes and layout of a benchmark, checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dwm.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PolicyConfig,
    TrainingConfig,
    UserError,
    WeightingConfig,
)
from megatron_dwm.config.schema_llm import Precision
from megatron_dwm.config.validate import length_problems

# Megatron pads the vocabulary to a multiple of this (megatron_dwm/model/shape.py).
_VOCAB_MULTIPLE = 128
# Longer than any measurement, so that the learning rate never reaches its end.
_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the model and the batch, layout and repeats. batch: samples of all replicas."""

    layers: int
    hidden: int
    heads: int
    query_groups: int
    ffn: int
    vocab: int
    sequence: int
    batch: int
    micro_batch: int
    precision: Precision
    tensor: int
    context: int
    pipeline: int
    virtual_stages: int
    sequence_parallel: bool
    sharded_optimizer: bool
    repeats: int
    warm_up: int

    def config(self) -> Config:
        """Returns the run's configuration; what is not set here has its default."""
        return Config(
            parallel=ParallelConfig(
                tensor=self.tensor,
                context=self.context,
                pipeline=self.pipeline,
                virtual_stages=self.virtual_stages,
                sequence=self.sequence_parallel,
                sharded_optimizer=self.sharded_optimizer,
            ),
            model=ModelConfig(
                precision=self.precision,
                hidden_size=self.hidden,
                num_layers=self.layers,
                num_attention_heads=self.heads,
                num_query_groups=self.query_groups,
                ffn_hidden_size=self.ffn,
                vocab_size=self.vocab,
                tied_embeddings=False,
            ),
            data=DataConfig(sequence_length=self.sequence),
            # A low rate and no warm-up: random tokens teach nothing, and the loss must stay finite.
            training=TrainingConfig(
                steps=_STEPS,
                global_batch_size=self.batch,
                micro_batch_size=self.micro_batch,
                learning_rate=1e-4,
                warmup_fraction=0.0,
            ),
            policy=PolicyConfig(name="dwm"),
            # A sample alone in its group always weighs 1.
            weighting=WeightingConfig(group="global" if self.micro_batch == 1 else "micro_batch"),
        )

    def check(self, world_size: int) -> None:
        """Raise UserError for the first size that does not divide what it must divide."""
        for problem in self._problems(world_size):
            raise UserError(problem)

    def _problems(self, world_size: int) -> Iterator[str]:
        processes = self.tensor * self.context * self.pipeline
        if world_size % processes:
            yield (
                f"--tensor {self.tensor} x --context {self.context} x --pipeline {self.pipeline}: "
                f"expected to divide the number of processes, which is {world_size}; start "
                "torchrun with another --nproc-per-node"
            )
        rows = self.micro_batch * (world_size // processes)
        stages = self.pipeline * self.virtual_stages
        padded_vocab = -(-self.vocab // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
        divisors = [
            ("--heads", self.heads, "--hidden", self.hidden),
            ("twice --heads", 2 * self.heads, "--hidden", self.hidden),
            ("--query-groups", self.query_groups, "--heads", self.heads),
            ("--tensor", self.tensor, "--query-groups", self.query_groups),
            ("--tensor", self.tensor, "--ffn", self.ffn),
            ("--tensor", self.tensor, "the padded vocabulary", padded_vocab),
            ("--pipeline x --virtual-stages", stages, "--layers", self.layers),
            ("--micro-batch x data-parallel replicas", rows, "--batch", self.batch),
        ]
        for name, value, of_name, of_value in divisors:
            if of_value % value:
                yield f"{name} {value}: expected to divide {of_name}, which is {of_value}"
        yield from self._parallel_problems(rows)

    def _parallel_problems(self, rows: int) -> Iterator[str]:
        if self.virtual_stages > 1 and self.pipeline == 1:
            yield "--virtual-stages: expected --pipeline above 1, got 1"
        if self.virtual_stages > 1 and (self.batch // rows) % self.pipeline:
            yield (
                f"--virtual-stages: expected a multiple of --pipeline {self.pipeline} "
                f"micro-batches, got {self.batch // rows}; change --batch or --micro-batch"
            )
        if self.sequence_parallel and self.tensor == 1:
            yield "--sequence-parallel: expected --tensor above 1, got 1"
        yield from length_problems(self.config(), "--sequence", self.sequence)
