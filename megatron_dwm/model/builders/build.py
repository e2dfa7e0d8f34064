"""Builds a chunk of the LLM as the class of Megatron-Core that `model.builder` names."""

from __future__ import annotations

from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_dwm.config import UserError
from megatron_dwm.config.schema_llm import Builder
from megatron_dwm.model.builders.chunk import Chunk
from megatron_dwm.model.builders.gpt import build_gpt
from megatron_dwm.runtime import releases


def require_builder(builder: Builder) -> None:
    """Raise UserError if the installed release of Megatron-Core lacks the class."""
    if builder == "hybrid" and not releases.has_hybrid_model():
        raise UserError(
            f"model.builder hybrid: Megatron-Core {releases.version()} has no HybridModel; install "
            "0.18 or newer, which needs Python 3.12, or use model.builder gpt, which reads the "
            "same checkpoints"
        )


def build_module(chunk: Chunk) -> LanguageModule:
    """Returns the chunk's model; Megatron-Core fills its parameters.

    Raises UserError if the installed release of Megatron-Core lacks the class.
    """
    require_builder(chunk.builder)
    if chunk.builder == "gpt":
        return build_gpt(chunk)
    # Older releases cannot import the file.
    from megatron_dwm.model.builders.hybrid import build_hybrid

    return build_hybrid(chunk)
