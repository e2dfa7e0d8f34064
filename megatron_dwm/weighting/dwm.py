"""DWM: weights from a weighting model that learns by hypergradients (arXiv 2507.16178).

The model reads a sample's tokens with an encoder of its own, or what the LLM's forward pass made of
it (`weighting.encoder`); how it is trained: weighting/trainer.py, METHOD.md, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs, LlamaShape
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.costs import Costs, learning_costs
from megatron_dwm.weighting.method import (
    Alignments,
    BuildContext,
    Counters,
    Method,
    Needs,
    WeightingUpdate,
)
from megatron_dwm.weighting.model import (
    WeightingModel,
    WeightingShape,
    build_weighting_model,
    load_weighting_model,
    read_weighting_shape,
    require_same_reading,
    what_is_not_compared,
)
from megatron_dwm.weighting.rules import group_problems, learning_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, schedule_of
from megatron_dwm.weighting.trainer import WeightingTrainer

_PARTS: frozenset[Part] = frozenset({"weighting_model", "groups"})
_LEARNING: frozenset[Part] = frozenset({"target", "updates", "alignments"})
# Keeps the weighting model's parameters apart from the LLM's under one run seed.
_SEED_OFFSET = 7919


class Dwm(Method):
    """A weighting model, the same on every rank of the world."""

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """A weighting model and, unless it is frozen, what it learns from."""
        return _PARTS if config.weighting.frozen else _PARTS | _LEARNING

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Rules of the weighting model, of its groups and, unless it is frozen, of learning."""
        learns = not config.weighting.frozen
        if learns:
            yield from target_problems(config)
        yield from _model_problems(config, num_layers)
        yield from group_problems(config)
        if learns:
            yield from learning_problems(config, world_size)

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """What an older file of `weighting.load` does not say."""
        if config.weighting.load is None:
            return
        directory = Path(config.weighting.load)
        wanted = _wanted_shape(config, llm, tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
        found = load_weighting_model(directory, wanted).shape
        if (text := what_is_not_compared(directory, found)) is not None:
            yield text

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """As `weighting.mode` says; no updates where the model is frozen."""
        return super().schedule(config) if config.weighting.frozen else schedule_of(config)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """The start with a loaded model, else the first update."""
        return 0 if config.weighting.load is not None else cls.schedule(config).first_update

    @classmethod
    def model_shape(cls, config: Config, llm: LlamaShape) -> WeightingShape:
        """The model of `weighting.load`, or the configured one.

        Vocabularies are not compared: the tokenizer that says the run's need not exist yet.
        """
        wanted = _wanted_shape(config, llm, llm.vocab_size)
        if config.weighting.load is None:
            return wanted
        directory = Path(config.weighting.load)
        found = read_weighting_shape(directory)
        require_same_reading(directory, found, replace(wanted, vocab_size=found.vocab_size))
        return found

    @classmethod
    def costs(
        cls, config: Config, llm: LlamaShape, *, replicas: int, passages: int | None = None
    ) -> Costs:
        """Learning costs with the weighting model's own."""
        training, weighting = config.training, config.weighting
        rows = training.global_batch_size // replicas
        share = -(-rows // config.parallel.model_size)
        own = weighting.encoder == "own"
        is_global = weighting.group == "global"
        return learning_costs(
            config,
            llm,
            passages=passages,
            model=cls.model_shape(config, llm),
            reads_first=not own and is_global and rows > training.micro_batch_size,
            encodes_twice=own and share > training.micro_batch_size,
            frozen=weighting.frozen,
        )

    @classmethod
    def build(cls, context: BuildContext) -> Dwm:
        """With a new weighting model, or that of `weighting.load`, which counts from the start."""
        config, tokenizer = context.config, context.tokenizer
        shape = _wanted_shape(
            config,
            context.llm.shape,
            tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
        )
        return cls(
            WeightingTrainer(
                _weighting_model(config, shape),
                config.weighting,
                context.llm.runtime,
                config.training.micro_batch_size,
                learned=config.weighting.load is not None,
                bf16=config.model.precision != "fp32",
            )
        )

    def __init__(self, trainer: WeightingTrainer) -> None:
        self.trainer = trainer

    def needs(self, counters: Counters) -> Needs:
        """Nothing before the first update: weights are 1 until then."""
        return self.update_needs if self.trainer.learned else Needs()

    @property
    def update_needs(self) -> Needs:
        """What the weighting model reads."""
        trainer = self.trainer
        if trainer.model.shape.encoder == "own":
            return Needs(whole_batch=trainer.grouping.is_global)
        return Needs(
            losses=True,
            early_layer=trainer.config.early_layer,
            whole_batch=trainer.grouping.is_global,
        )

    def weighs(self, counters: Counters) -> bool:
        """True once the model has learned."""
        return self.trainer.learned

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """float32 [n], mean 1 in every weighting group; exactly 1 before the first update."""
        trainer = self.trainer
        if not trainer.learned:
            return torch.ones(batch.size, device=batch.tokens_BS.device)
        return trainer.grouping.local(trainer.group_weights(batch, outputs))

    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """One AdamW step of the weighting model towards a lower validation loss."""
        return self.trainer.update(batch, outputs, alignments)

    def files(self) -> dict[str, bytes]:
        """The weighting model, for `weighting.load` of another run."""
        return self.trainer.model.files()

    def state_dict(self) -> dict[str, Any]:
        """The model, its optimizer and what the updates remember."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`; learning rate and weight decay stay as configured."""
        self.trainer.load_state_dict(state)


def _model_problems(config: Config, num_layers: int) -> Iterator[str]:
    weighting = config.weighting
    if weighting.frozen and weighting.load is None:
        yield "weighting.frozen: expected weighting.load to name a weighting model, got none"
    # A loaded model has its own sizes.
    if weighting.load is None and weighting.hidden_size % (2 * weighting.num_attention_heads):
        yield (
            f"weighting.hidden_size {weighting.hidden_size}: expected a multiple of twice "
            f"weighting.num_attention_heads, {2 * weighting.num_attention_heads}"
        )
    if weighting.encoder == "llm" and not 1 <= weighting.early_layer <= num_layers:
        yield (
            f"weighting.early_layer {weighting.early_layer}: expected 1 to the LLM's number of "
            f"layers, {num_layers}"
        )


def _wanted_shape(
    config: Config, llm: LlamaShape, vocab_size: int, *, tokenizer_sha256: str | None = None
) -> WeightingShape:
    """The weighting model that the configuration asks for.

    tokenizer_sha256: None where only sizes are wanted, and no tokenizer is at hand.
    """
    weighting = config.weighting
    return WeightingShape(
        vocab_size=vocab_size,
        hidden_size=weighting.hidden_size,
        num_layers=weighting.num_layers,
        num_attention_heads=weighting.num_attention_heads,
        ffn_hidden_size=weighting.ffn_hidden_size,
        encoder=weighting.encoder,
        feature_size=llm.hidden_size if weighting.encoder == "llm" else 0,
        tokenizer_sha256=tokenizer_sha256 if weighting.encoder == "own" else None,
    )


def _weighting_model(config: Config, shape: WeightingShape) -> WeightingModel:
    if config.weighting.load is None:
        return build_weighting_model(shape, config.run.seed + _SEED_OFFSET)
    return load_weighting_model(Path(config.weighting.load), shape)
