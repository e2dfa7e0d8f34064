"""DWM: weights from a weighting model that learns by hypergradients (arXiv 2507.16178).

The model reads a sample's tokens with its own encoder, or the LLM's hidden states of the sample
(`weighting.encoder`). weighting/trainer.py trains it (METHOD.md, section 2).

A frozen model can also filter: of `weighting.pool_batches` global batches it keeps the samples with
the largest logits, each computed in its weighting group. Logits, because weights compare a sample
with its group only: the best of a bad micro-batch would beat the second best of a good one. Groups
have the size that the model learned in: with `weighting.group global` each global batch of the pool
is one.
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
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape, forward_only
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs
from megatron_dwm.weighting.method import (
    Alignments,
    BuildContext,
    Counters,
    Needs,
    WeightingUpdate,
)
from megatron_dwm.weighting.model import (
    WeightingModel,
    WeightingShape,
    build_weighting_model,
    load_weighting_model,
    read_weighting_shape,
    require_same_input,
    unchecked_tokenizer_warning,
)
from megatron_dwm.weighting.pool import ChoosesFromPool
from megatron_dwm.weighting.rules import group_problems, learning_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, schedule_of
from megatron_dwm.weighting.trainer import WeightingTrainer

_PARTS: frozenset[Part] = frozenset({"weighting_model", "groups", "pool"})
_LEARNING: frozenset[Part] = frozenset(
    {"target", "passages", "updates", "hypergradients", "alignments"}
)
# Gives the weighting model another seed than the LLM's, from the same run.seed.
_SEED_OFFSET = 7919


class Dwm(ChoosesFromPool):
    """Weights from a weighting model, which is the same on every rank of the job."""

    gentler = f"{GUARDS}, or lower weighting.learning_rate"

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a weighting model and groups and, unless frozen, those of learning."""
        parts = _PARTS if _only_selects(config) else _PARTS | {"softmax"}
        return parts if config.weighting.frozen else parts | _LEARNING

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the weighting model, its groups and, unless frozen, of learning."""
        learns = not config.weighting.frozen
        if learns:
            yield from target_problems(config)
        yield from _model_problems(config, num_layers)
        if not _only_selects(config):
            yield from group_problems(config)
        if learns:
            yield from learning_problems(config, world_size)

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """Yields a line if an older file of `weighting.load` does not name its tokenizer."""
        if config.weighting.load is None:
            return
        directory = Path(config.weighting.load)
        wanted = _wanted_shape(config, llm, tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
        found = load_weighting_model(directory, wanted).shape
        if (text := unchecked_tokenizer_warning(directory, found)) is not None:
            yield text

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns the schedule of `weighting.mode`, or one without updates if frozen."""
        return super().schedule(config) if config.weighting.frozen else schedule_of(config)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 0 with a loaded model, else the step of the first update."""
        return 0 if config.weighting.load is not None else cls.schedule(config).first_update

    @classmethod
    def model_shape(cls, config: Config, llm: LlamaShape) -> WeightingShape:
        """Returns the shape of the model of `weighting.load`, or the configured shape.

        Vocabulary sizes are not compared, since the run's tokenizer may not exist yet.
        """
        wanted = _wanted_shape(config, llm, llm.vocab_size)
        if config.weighting.load is None:
            return wanted
        directory = Path(config.weighting.load)
        found = read_weighting_shape(directory)
        require_same_input(directory, found, replace(wanted, vocab_size=found.vocab_size))
        return found

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of learning, including those of the weighting model."""
        return _costs(config, llm, workload, cls.model_shape(config, llm))

    @classmethod
    def build(cls, context: BuildContext) -> Dwm:
        """Build the method with a new weighting model, or with that of `weighting.load`.

        A loaded model gives the weights from the first step on.
        """
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
            ),
            batches=config.weighting.pool_batches,
            only_selects=_only_selects(config),
        )

    def __init__(
        self, trainer: WeightingTrainer, *, batches: int = 1, only_selects: bool = False
    ) -> None:
        """batches: in a pool. only_selects: the model chooses from it, and all weights are 1."""
        self.trainer, self.batches, self.only_selects = trainer, batches, only_selects

    def needs(self, counters: Counters) -> Needs:
        """Returns what the weighting model reads; nothing before the first update."""
        return self.update_needs if self.weighs(counters) else Needs()

    @property
    def update_needs(self) -> Needs:
        """What the weighting model reads of the samples."""
        trainer = self.trainer
        if trainer.model.shape.encoder == "own":
            return Needs(whole_batch=trainer.grouping.is_global)
        return Needs(
            losses=True,
            early_layer=trainer.config.early_layer,
            whole_batch=trainer.grouping.is_global,
        )

    def weighs(self, counters: Counters) -> bool:
        """True after the first update, or with a loaded model, unless that only selects."""
        return self.trainer.learned and not self.only_selects

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 before the first update."""
        if not self.weighs(counters):
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        return self.trainer.weights(batch, outputs)

    @torch.no_grad()
    def pool_scores(
        self, llm: LLM, pool: Batch, passages: Batch | None, counters: Counters
    ) -> Tensor:
        """Returns float32 [n], logits of this replica's candidates, in their weighting groups."""
        needs, size = self.update_needs, self.trainer.grouping.micro_batch_size
        if not needs.forward_pass:
            return self.trainer.pool_logits(pool, None, self.batches)
        first = forward_only(llm, unit(pool, size), early_layer=needs.early_layer)
        return self.trainer.pool_logits(pool, first.outputs, self.batches)

    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Take one AdamW step of the weighting model toward a lower validation loss."""
        return self.trainer.update(batch, outputs, alignments)

    def files(self) -> dict[str, bytes]:
        """Returns the files of the weighting model, for `weighting.load` of another run."""
        return self.trainer.model.files()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the model, its optimizer and its updates."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`, but not its learning rate and weight decay."""
        self.trainer.load_state_dict(state)


def _only_selects(config: Config) -> bool:
    """True if a frozen model chooses from pools and all weights are 1."""
    weighting = config.weighting
    return weighting.pool_batches > 1 and weighting.kept_weights == "equal"


def _costs(config: Config, llm: LlamaShape, workload: Workload, model: WeightingShape) -> Costs:
    """Returns the costs of learning, of weighing, and of scoring pools."""
    training, weighting = config.training, config.weighting
    rows = training.global_batch_size // workload.replicas
    share = -(-rows // config.parallel.model_size)
    own = weighting.encoder == "own"
    is_global = weighting.group == "global"
    costs = learning_costs(
        config,
        llm,
        workload,
        gradient_pass=weighting.update_on == "fresh",
        model=model,
        extra_forward=not own and is_global and rows > training.micro_batch_size,
        encodes_twice=own and share > training.micro_batch_size,
        frozen=weighting.frozen,
    )
    pools = weighting.pool_batches
    if pools == 1:
        return costs
    costs = replace(
        costs,
        pool_passes=0.0 if own else pools * costs.forward,
        pool_scores=pools * costs.weighing,
    )
    return replace(costs, weighing=0.0, extra_forward=0.0) if _only_selects(config) else costs


def _model_problems(config: Config, num_layers: int) -> Iterator[str]:
    weighting = config.weighting
    if weighting.pool_batches > 1 and not weighting.frozen:
        yield (
            f"weighting.pool_batches {weighting.pool_batches}: expected weighting.frozen true with "
            "policy dwm: a model that still learns weighs what it reads; set it, with "
            "weighting.load, or leave weighting.pool_batches at 1"
        )
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
    """Returns the shape of the weighting model in the configuration.

    tokenizer_sha256: None if only sizes are needed and there is no tokenizer.
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
