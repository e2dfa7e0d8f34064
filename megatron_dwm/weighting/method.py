"""The interface of methods: one Protocol, one file per method, one registry (config/methods.py).

A method declares what it needs to know about a sample. Tokens and labels exist before the LLM runs.
Losses and features are outputs of the LLM's own forward pass; weights from them are computed inside
that pass (training/step.py), on the last pipeline stage.

The class methods answer questions about a configuration, before anything is built, so that no code
outside this folder depends on a method's name. All defaults are those of plain training.

The interface is public: methods outside the package inherit from it (docs/plugins.md). What they
may use is what megatron_dwm/plugin.py exports.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.config.options import read_options
from megatron_dwm.data import Batch, Source, ValidationSet
from megatron_dwm.data.token_losses import TokenLosses
from megatron_dwm.data.values import DocumentValues
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape
from megatron_dwm.model.offload import Offload
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.costs import Costs, Workload, plain_costs
from megatron_dwm.weighting.model import WeightingShape
from megatron_dwm.weighting.schedule import Schedule

CONTRACT_VERSION = 1
"""Version of the interface of methods outside the package. It is raised with a change that such a
method can notice (something it calls or overrides is removed, renamed or means something else), and
stays with an addition that has a default."""


class Counters(Protocol):
    """Progress of the run.

    step: LLM steps done. updates: weighting updates made, by any method that the run had.
    stage_updates: updates made since the last step; several come before a stage's first step.
    """

    @property
    def step(self) -> int: ...

    @property
    def updates(self) -> int: ...

    @property
    def stage_updates(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method reads of its samples in addition to their tokens.

    losses: token-mean losses.
    early_layer: layer (from 1) of the early pooled hidden states; None if it reads none.
    whole_batch: a sample's weight depends on every sample of the global batch.
    on_every_rank: with `whole_batch`, every rank computes the weights, not only the last stages.
    relative: `weights` returns them up to a common factor, for one micro-batch at a time; the pass
        divides by their mean over the batch, and `after_weighing` is told.
    """

    losses: bool = False
    early_layer: int | None = None
    whole_batch: bool = False
    on_every_rank: bool = False
    relative: bool = False

    @property
    def forward_pass(self) -> bool:
        """True if a forward pass of the LLM must come before the weights."""
        return self.losses or self.early_layer is not None


@dataclass(frozen=True, kw_only=True)
class Alignments:
    """The alignments that a method learns from.

    values_n: float32, s_i of this replica's samples (METHOD.md, section 2).
    learning_rate: the LLM's eta, needed if the scale of the alignments matters.
    known_n: bool, False where no alignment was computed; None: all are known.
    signal_to_noise: ratio of these alignments; None if it was not measured.
    """

    values_n: Tensor
    learning_rate: float
    known_n: Tensor | None = None
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class WeightingUpdate:
    """The result of one update.

    weights_n: float32, this replica's weights before the update.
    grad_norm: norm of the weighting model's gradient before clipping; None without a model.
    cosine: cosine similarity of that gradient and the previous one; None in the first update.
    """

    weights_n: Tensor
    grad_norm: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class OwnUpdate:
    """The result of an update that computes no hypergradient.

    losses_n, weights_n: float32, of this replica's units of the batch that it read.
    val_loss: mean over the tokens of the passages. grad_norm: of the model that it trained.
    """

    losses_n: Tensor
    weights_n: Tensor
    val_loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Everything that a method may be built from.

    target: None if the method reads none. reference: a second LLM; None if the method has none.
    reference_optimizer: None if the reference does not change. reference_offload: has
        both on the device while they are in use. values: what `document_values` returned.
    """

    config: Config
    llm: LLM
    tokenizer: Tokenizer
    target: ValidationSet | None = None
    reference: LLM | None = None
    reference_optimizer: ChainedOptimizer | None = None
    reference_offload: Offload = field(default_factory=Offload)
    values: DocumentValues | None = None


class MethodConfiguration(Protocol):
    """What a method says of a configuration, before anything is built."""

    contract_version: ClassVar[int | None] = None
    """the `CONTRACT_VERSION` that the method was written for; one outside the package states it"""
    options: ClassVar[type | None] = None
    """a frozen dataclass: the names, types and defaults of `policy.options`; None: it has none"""
    learns_from_alignments: ClassVar[bool] = False
    """True: `weighting.update_on` applies; for the package's own, config/methods.py says it"""
    gentler: ClassVar[str] = "report it: this method has equal weights"
    """what to change if a few samples get nearly all the weight"""
    units: ClassVar[frozenset[str]] = frozenset({"sample", "document"})
    """the values of `weighting.unit` that the method can weigh"""
    own_updates: ClassVar[bool] = False
    """True: updates are passes of the method's own (`own_update`), without a hypergradient"""
    aligns_first: ClassVar[bool] = False
    """an update inside a step gives that step's own weights: it computes the alignments of the
    batch at uniform weights, and `weights` finds them in its `outputs`"""

    @classmethod
    def own_options(cls, config: Config) -> Any:
        """Returns `policy.options` as an instance of `options`; None without options.

        Raises UserError for an unknown name, a wrong type, and a ValueError of the dataclass.
        """
        return read_options(cls.options, config.policy.options, config.policy.name)

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts of the method; keys of other parts have no effect with it."""
        return frozenset()

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Yields a line for every rule that the configuration breaks.

        num_layers: layers of the LLM.
        """
        yield from ()

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """Yields warnings about settings or files that are allowed, but may surprise.

        Raises UserError if a file is missing or does not fit.
        """
        yield from ()

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Yields the keys and files whose content must be the same in a resumed run."""
        if "target" in cls.parts(config) and config.validation.path is not None:
            yield "validation.path", Path(config.validation.path)

    @classmethod
    def document_values(cls, config: Config) -> DocumentValues | None:
        """Returns the values that batches carry (`Batch.values_U`); None if the method reads none.

        Raises UserError if they cannot be read.
        """
        return None

    @classmethod
    def token_losses(cls, config: Config) -> TokenLosses | None:
        """Returns `Batch.reference_losses_BS`, or None. Raises UserError for unreadable ones."""
        return None

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns the steps at which the method updates."""
        return Schedule(steps=config.training.steps)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns the first step (from 0) with weights from a model; `training.steps` if none."""
        return config.training.steps

    @classmethod
    def model_shape(cls, config: Config, llm: LlamaShape) -> WeightingShape | None:
        """Returns the shape of the weighting model, for the planner; None if there is none."""
        return None

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the FLOPs of the run's parts."""
        return plain_costs(config, llm, workload)

    @classmethod
    def pool_batches(cls, config: Config) -> int:
        """Returns the global batches that a step reads; above 1 it trains on one (pool.py)."""
        return 1

    @classmethod
    def training_source(
        cls, config: Config, corpus: Source, target: ValidationSet | None
    ) -> Source:
        """Returns the batches that the LLM trains on."""
        return corpus


class Method(MethodConfiguration, Protocol):
    """Decides the weights of samples.

    It gets this replica's samples of one optimizer step; or one micro-batch of them, if it needs
    the forward pass but not the whole batch.

    Only `weights` is abstract. A type checker takes a method of a protocol without a statement of
    its own, or with nothing but NotImplementedError, for abstract, too: hence the bare `return`s.
    """

    sketch_size: int | None = None
    """size of the sketches of units' steps that an update forms (bilevel/sketch.py); None: none"""

    @classmethod
    def build(cls, context: BuildContext) -> Method:
        """Build the method of a run. Raises UserError for files that do not fit."""
        return cls()

    def needs(self, counters: Counters) -> Needs:
        """Returns what `weights` reads at this point of the run."""
        return Needs()

    @property
    def update_needs(self) -> Needs:
        """What `update` or `read_target` reads in addition to tokens."""
        return Needs()

    def before_step(self, counters: Counters) -> None:
        """Prepare for the next step (every rank calls it, before anything else of the step)."""
        return

    def weighs(self, counters: Counters) -> bool:
        """True if the method computes weights for the next batch, which costs FLOPs."""
        return False

    def reference_losses(self, batch: Batch) -> Tensor | None:
        """Returns a reference's losses, float32 [n], for `weights`; None without (collective)."""
        return None

    @abstractmethod
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], a weight per unit: finite, non-negative, mean 1 over the batch.

        The mean counts every unit in proportion to its size (`Batch.units`).
        outputs: the LLM's outputs for the same units; None if the method needs none.
        """
        ...

    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Learn from this replica's samples and their alignments (collective over the world)."""
        reason = "a method whose schedule has updates learns from them"
        raise NotImplementedError(reason)

    def own_update(
        self, llm: LLM, batch: Batch, passages: Batch, counters: Counters
    ) -> OwnUpdate | None:
        """Make an update of one's own from this replica's rows (collective); None: not finite."""
        reason = "a method with own_updates has its own"
        raise NotImplementedError(reason)

    def read_target(self, passages: Batch, outputs: ForwardOutputs) -> None:
        """Update from this replica's passages and their `update_needs` alone (collective)."""
        reason = "a method that updates without hypergradients reads the target"
        raise NotImplementedError(reason)

    def after_weighing(self, batch: Batch, relative_n: Tensor) -> None:
        """Read this replica's weights of a step that was taken, as `weights` returned them.

        Called if the step's `needs` were `relative`, and before `after_step` (collective).
        """
        return

    def step_statistics(self) -> dict[str, Tensor]:
        """Returns scalars about the last step's weights for metrics.jsonl, by name."""
        return {}

    def after_step(self, batch: Batch, losses_n: Tensor, counters: Counters) -> None:
        """Record the token-mean losses of this replica's units in a step that was taken."""
        return

    def files(self) -> dict[str, bytes]:
        """Returns files that another run can use, by name; empty if there are none.

        The main process alone calls it, so it may make no collective call.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`. Raises KeyError or ValueError if it does not fit."""
        return
