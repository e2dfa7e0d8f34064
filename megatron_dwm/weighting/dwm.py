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

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, ForwardOutputs, forward_only
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.weighting.dwm_configuration import (
    DwmConfiguration,
    only_selects,
    wanted_shape,
)
from megatron_dwm.weighting.loaded import (
    StageModels,
    load_models,
)
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
)
from megatron_dwm.weighting.trainer import WeightingTrainer

# Gives the weighting model another seed than the LLM's, from the same run.seed.
_SEED_OFFSET = 7919


class Dwm(DwmConfiguration):
    """Weights from a weighting model, which is the same on every rank of the job."""

    @classmethod
    def build(cls, context: BuildContext) -> Dwm:
        """Build the method with a new weighting model, or with that of `weighting.load`.

        A loaded model gives the weights from the first step on.
        """
        config, tokenizer = context.config, context.tokenizer
        shape = wanted_shape(
            config,
            context.llm.shape,
            tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
        )
        model, stages = _weighting_model(config, shape)
        return cls(
            WeightingTrainer(
                model,
                config.weighting,
                context.llm.runtime,
                config.training.micro_batch_size,
                learned=config.weighting.load is not None,
                bf16=config.model.precision != "fp32",
            ),
            stages=stages,
            batches=config.weighting.pool_batches,
            only_selects=only_selects(config),
        )

    def __init__(
        self,
        trainer: WeightingTrainer,
        *,
        stages: StageModels | None = None,
        batches: int = 1,
        only_selects: bool = False,
    ) -> None:
        """batches: in a pool. only_selects: the model chooses from it, and all weights are 1."""
        self.trainer, self.stages = trainer, stages
        self.batches, self.only_selects = batches, only_selects

    def before_step(self, counters: Counters) -> None:
        """Take the model of the step's stage, if stages have models of their own."""
        if self.trainer.weigher.deferred is not None:
            self.trainer.weigher.deferred.begin_step()
        if self.stages is not None:
            self.stages.put_into(self.trainer.model, counters.step)

    def needs(self, counters: Counters) -> Needs:
        """Returns what the weighting model reads; nothing before the first update."""
        return self.update_needs if self.weighs(counters) else Needs()

    @property
    def update_needs(self) -> Needs:
        """What the weighting model reads of the samples."""
        trainer, weigher = self.trainer, self.trainer.weigher
        is_global = weigher.grouping.is_global
        if trainer.model.shape.encoder == "own":
            return Needs(whole_batch=is_global)
        relative = weigher.weighs_relatively
        # A loaded model's first batch sets the temperature, which every rank keeps.
        settles = weigher.deferred is not None and not relative
        return Needs(
            losses=True,
            early_layer=trainer.config.early_layer,
            whole_batch=is_global and not relative,
            on_every_rank=settles,
            relative=relative,
        )

    def weighs(self, counters: Counters) -> bool:
        """True after the first update, or with a loaded model, unless that only selects."""
        return self.trainer.learned and not self.only_selects

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 before the first update.

        If `needs` are relative, the mean is 1 after the pass.
        """
        if not self.weighs(counters):
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        return self.trainer.weigher.weights(batch, outputs)

    @torch.no_grad()
    def after_weighing(self, batch: Batch, relative_n: Tensor) -> None:
        """Set the next step's temperature (collective)."""
        self.trainer.weigher.after_weighing(batch, relative_n)

    def step_statistics(self) -> dict[str, Tensor]:
        """Returns the softmax's temperature for the next step, and the drift of the last one's."""
        deferred = self.trainer.weigher.deferred
        return {} if deferred is None else deferred.statistics()

    @torch.no_grad()
    def pool_scores(
        self, llm: LLM, pool: Batch, passages: Batch | None, counters: Counters
    ) -> Tensor:
        """Returns float32 [n], logits of this replica's candidates, in their weighting groups."""
        needs, size = self.update_needs, self.trainer.weigher.grouping.micro_batch_size
        if not needs.forward_pass:
            return self.trainer.weigher.pool_logits(pool, None, self.batches)
        first = forward_only(llm, unit(pool, size), early_layer=needs.early_layer)
        return self.trainer.weigher.pool_logits(pool, first.outputs, self.batches)

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
        if self.stages is not None:
            self.stages.forget()


def _weighting_model(
    config: Config, shape: WeightingShape
) -> tuple[WeightingModel, StageModels | None]:
    if config.weighting.load is None:
        return build_weighting_model(shape, config.run.seed + _SEED_OFFSET), None
    return load_models(config, shape)
