"""The reference model of a method that has one: its check before processes start, and itself."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.validate import validate_layout
from megatron_dwm.model import LLM, LlamaShape, build_llm
from megatron_dwm.model.shape import heads_of
from megatron_dwm.run.starting_point import load_model, shape_of_model
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting import method_class

_KEY = "policy.reference"


def check_reference(config: Config, llm: LlamaShape, world_size: int) -> LlamaShape | None:
    """Returns the shape of `policy.reference` and checks it; None if the method has none.

    Raises UserError if it cannot be read, has another vocabulary than the LLM, or cannot be split
    like it.
    """
    path = config.policy.reference
    if "reference" not in method_class(config).parts(config) or path is None:
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


def build_reference(config: Config, shape: LlamaShape | None, runtime: Runtime) -> LLM | None:
    """Build the reference model in the layout and precision of the LLM, without gradients.

    A collective call.
    """
    if shape is None or config.policy.reference is None:
        return None
    llm = build_llm(
        shape,
        config.model,
        config.parallel,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        trained=False,
    )
    load_model(llm, Path(config.policy.reference))
    return llm
