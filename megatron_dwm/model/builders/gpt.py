"""Builds a chunk as Megatron-Core's GPTModel, which every release has."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from megatron_dwm.model.builders.chunk import Chunk


def build_gpt(chunk: Chunk) -> GPTModel:
    """Returns the chunk's model; Megatron-Core fills its parameters."""
    shape = chunk.shape
    return GPTModel(
        chunk.config,
        chunk.layers,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=chunk.sequence_length,
        pre_process=chunk.is_first,
        post_process=chunk.is_last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        # Its other constants are Llama 3's: see LlamaShape.rope_scaling_factor.
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        vp_stage=chunk.virtual_stage,
    )
