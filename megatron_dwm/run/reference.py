"""The reference model of a method that has one: its check before processes start, and itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.checkpoint.parts import TrainedModel
from megatron_dwm.checkpoint.sharded_adam import create_state
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.validate import validate_layout
from megatron_dwm.model import LLM, LlamaShape, build_llm
from megatron_dwm.model.offload import Offload
from megatron_dwm.model.shape import heads_of
from megatron_dwm.run.starting_point import load_model, shape_of_model
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.optimizer import build_optimizer
from megatron_dwm.weighting import method_class

_KEY = "policy.reference"


def check_reference(config: Config, llm: LlamaShape, world_size: int) -> LlamaShape | None:
    """Returns the shape of `policy.reference` and checks it; None if the method has none.

    Raises UserError if it cannot be read, has another vocabulary than the LLM, or cannot be split
    like it.
    """
    path, parts = config.policy.reference, method_class(config).parts(config)
    if "dynamic_reference" in parts:
        return llm  # a copy of the LLM
    if "reference" not in parts or path is None or config.policy.reference_losses is not None:
        return None
    shape = shape_of_model(Path(path), _KEY)
    if shape.vocab_size != llm.vocab_size:
        raise UserError(
            f"{_KEY}: {path} has a vocabulary of {shape.vocab_size}, the LLM has "
            f"{llm.vocab_size}; their losses of a token cannot be compared"
        )
    try:
        validate_layout(config, heads_of(shape), world_size)
    except UserError as error:
        raise UserError(f"{_KEY}: {path} cannot be split like the LLM: {error}") from None
    return shape


@dataclass(frozen=True)
class Reference:
    """A reference model.

    optimizer: None if it does not change. offload: has both on the device while they are in use.
    """

    llm: LLM
    optimizer: ChainedOptimizer | None = None
    offload: Offload = field(default_factory=Offload)

    @property
    def saved(self) -> TrainedModel | None:
        """What a checkpoint has of it: nothing if it does not change."""
        if self.optimizer is None:
            return None
        return TrainedModel(llm=self.llm, optimizer=self.optimizer, offload=self.offload)


def build_reference(config: Config, shape: LlamaShape | None, runtime: Runtime) -> Reference | None:
    """Build the reference model in the layout and precision of the LLM (collective).

    Returns None if the method has none.
    """
    if shape is None:
        return None
    # A reference that follows the LLM comes from no files, whatever a shared configuration names.
    follows = "dynamic_reference" in method_class(config).parts(config)
    path = None if follows else config.policy.reference
    waits = config.policy.offload_reference
    llm = build_llm(
        shape,
        config.model,
        # It may wait in host memory between its step and the pass that would gather.
        replace(config.parallel, overlap_param_gather=False),
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        trained=path is None,
    )
    if path is not None:
        load_model(llm, Path(path))
        return Reference(llm, offload=Offload(llm if waits else None))
    training = replace(config.training, learning_rate=config.policy.reference_learning_rate)
    optimizer = build_optimizer(training, llm, sharded=config.parallel.sharded_optimizer)
    # A checkpoint may come before the reference's first step, and Adam's state is in it.
    create_state(llm, optimizer)
    return Reference(llm, optimizer, Offload(llm if waits else None, optimizer))
