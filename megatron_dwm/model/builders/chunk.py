"""What a builder needs to know of one chunk of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.schema_llm import Builder
from megatron_dwm.model.shape import LlamaShape


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive layers of the LLM on one rank.

    builder: the class to build. config: Megatron-Core's configuration for that class.
    layers: one spec for each whole layer, and the final norm's.
    is_first, is_last: with the input embedding; with the final norm and the output layer.
    virtual_stage: number of the chunk on its pipeline stage; None if the stage has one.
    """

    builder: Builder
    shape: LlamaShape
    config: TransformerConfig
    layers: TransformerBlockSubmodules
    sequence_length: int
    is_first: bool
    is_last: bool
    virtual_stage: int | None = None
