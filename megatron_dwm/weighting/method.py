"""Everything that decides weights: one Protocol, one file a method, one registry (config/methods).

A method says what it needs to know of a sample. Tokens and labels are there before the LLM runs;
losses and features are what the LLM's own forward pass has just made of the sample, and weights
from them are formed inside that pass (training/step.py), on the last pipeline stage.

The class methods speak of a configuration, before anything is built: nothing outside this folder
asks for a method's name. Their defaults, and those of the rest, are plain training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch, Source, ValidationSet
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.costs import Costs, plain_costs
from megatron_dwm.weighting.model import WeightingShape
from megatron_dwm.weighting.schedule import Schedule


class Counters(Protocol):
    """How far the run is. step: LLM steps done. updates: weighting updates made."""

    @property
    def step(self) -> int: ...

    @property
    def updates(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method reads of its samples besides their tokens.

    losses: token-mean losses.
    early_layer: pooled hidden states, the early ones after this layer (from 1); None for none.
    whole_batch: a sample's weight depends on every sample of the global batch.
    """

    losses: bool = False
    early_layer: int | None = None
    whole_batch: bool = False

    @property
    def forward_pass(self) -> bool:
        """True if the LLM has to read the samples first."""
        return self.losses or self.early_layer is not None


@dataclass(frozen=True, kw_only=True)
class Alignments:
    """What a method learns from.

    values_n: float32, s_i of this replica's samples (METHOD.md, section 2).
    learning_rate: the LLM's eta, where the scale of alignments matters.
    signal_to_noise: of these alignments, where it was measured.
    """

    values_n: Tensor
    learning_rate: float
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class WeightingUpdate:
    """One update of a method.

    weights_n: float32, this replica's weights before the update.
    grad_norm: of the weighting model's gradient, before clipping; None without a model.
    cosine: of that gradient to the previous update's; None for the first.
    """

    weights_n: Tensor
    grad_norm: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a method may be built from. target: None where the method reads none."""

    config: Config
    llm: LLM
    tokenizer: Tokenizer
    target: ValidationSet | None = None


class Method(Protocol):
    """A method sees this replica's samples of one optimizer step, or, where it needs the forward
    pass and not the whole batch, one micro-batch of them.
    """

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """What the method consists of; a key of another part has no effect with it."""
        return frozenset()

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """A line for every rule that the configuration breaks. num_layers: of the LLM."""
        yield from ()

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """A line for everything that cannot be checked of the files that the method starts from.

        Raises UserError if one of them is missing or does not fit.
        """
        yield from ()

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Files whose content a resumed run must find unchanged, with the keys that name them."""
        if "target" in cls.parts(config) and config.validation.path is not None:
            yield "validation.path", Path(config.validation.path)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """When the method updates."""
        return Schedule(steps=config.training.steps)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """The first step (from 0) whose weights a weighting model gives; past the last without."""
        return config.training.steps

    @classmethod
    def model_shape(cls, config: Config, llm: LlamaShape) -> WeightingShape | None:
        """The weighting model that the method keeps on every rank, for memory and messages."""
        return None

    @classmethod
    def costs(
        cls, config: Config, llm: LlamaShape, *, replicas: int, passages: int | None = None
    ) -> Costs:
        """FLOPs of the run's parts. passages: in a validation batch, if not as configured."""
        return plain_costs(config, llm)

    @classmethod
    def training_source(
        cls, config: Config, corpus: Source, target: ValidationSet | None
    ) -> Source:
        """What the LLM trains on."""
        return corpus

    @classmethod
    def build(cls, context: BuildContext) -> Method:
        """The method of a run. Raises UserError for files that do not fit."""
        return cls()

    def needs(self, counters: Counters) -> Needs:
        """What `weights` reads at this moment."""
        return Needs()

    @property
    def update_needs(self) -> Needs:
        """What `update` reads of its samples."""
        return Needs()

    def weighs(self, counters: Counters) -> bool:
        """True if the next batch goes through a weighting model, which costs FLOPs."""
        return False

    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """float32 [n], one a sample, finite, non-negative, mean 1 over the global batch.

        outputs: what the LLM made of the same samples; None where nothing of it is needed.
        """
        ...

    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Learn from this replica's samples and their alignments (collective over the world)."""
        raise NotImplementedError("a method whose schedule has updates learns from them")

    def after_step(self, losses_n: Tensor, counters: Counters) -> None:
        """Note the token-mean losses of this replica's samples of a step that was taken."""

    def files(self) -> dict[str, bytes]:
        """What can be used in another run, by file name; empty for nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`. Raises KeyError or ValueError if it does not fit."""
