"""Builds a chunk as Megatron-Core's HybridModel, with a block of attention and one of MLP a layer.

Only releases that have HybridModel can import this file. Three things of Megatron-Core's stack of
blocks are replaced, by its spec (models/hybrid/hybrid_block.py of 0.19):

* A stack has one spec for all its blocks of a kind. Ours takes one for each layer, since the first
  and the last may multiply in another precision.
* Its final norm is Transformer Engine's alone, and its name is `final_norm`. Ours is the one of the
  layers' spec, under GPTModel's name.
* It saves each block under a number of its own. Ours saves layers as GPTModel's does, stacked in
  one tensor for each parameter, so that either class reads what the other saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_dwm.model.builders.blocks import BLOCKS
from megatron_dwm.model.builders.chunk import Chunk
from megatron_dwm.model.shape import LlamaShape

_LAYER = Symbols.ATTENTION + Symbols.MLP
_BLOCKS = BLOCKS["hybrid"]


class Block(TransformerLayer):
    """Half of a layer, attention or MLP, from the spec of its number."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mapping[int, TransformerLayerSubmodules],
        layer_number: int,
        **arguments: Any,
    ) -> None:
        """submodules: of every block of the chunk, by its `layer_number`."""
        super().__init__(config, submodules[layer_number], layer_number, **arguments)


class LlamaStack(HybridStack):
    """The blocks of a chunk and its final norm, saved as GPTModel saves layers."""

    blocks_per_layer = _BLOCKS

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerBlockSubmodules,
        *,
        pp_layer_offset: int,
        post_process: bool,
        **arguments: Any,
    ) -> None:
        """submodules: one spec for each layer of the chunk, and the final norm's."""
        blocks = ModuleSpec(Block, submodules=_halves(submodules.layer_specs, pp_layer_offset))
        super().__init__(
            config,
            HybridStackSubmodules(attention_layer=blocks, mlp_layer=blocks),
            pp_layer_offset=pp_layer_offset,
            post_process=post_process,
            post_layer_norm=False,
            **arguments,
        )
        if post_process:
            self.final_layernorm = submodules.layer_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, *inputs: Any, **arguments: Any) -> Tensor:
        """Returns the last hidden state [S, B, D], after the final norm on the last stage."""
        hidden_SBD = super().forward(*inputs, **arguments)
        return self.final_layernorm(hidden_SBD) if self.post_process else hidden_SBD

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Returns the parameters, with a leading axis over the layers of the whole model."""
        assert not sharded_offsets
        num_layers = self.config.num_layers // _BLOCKS
        state: ShardedStateDict = {}
        for index, block in enumerate(self.layers):
            local, number = f"{prefix}layers.{index}.", (block.layer_number - 1) // _BLOCKS
            part = block.sharded_state_dict(local, [(0, number, num_layers)], metadata)
            replace_prefix_for_sharding(part, local, f"{prefix}layers.")
            state |= part
        if self.post_process:
            state |= sharded_state_dict_default(
                self.final_layernorm, f"{prefix}final_layernorm.", (), metadata, self.tp_group
            )
        return state


class LlamaModel(HybridModel):
    """HybridModel, saved as GPTModel."""

    def sharded_state_dict(
        self, prefix: str = "", *arguments: Any, **named: Any
    ) -> ShardedStateDict:
        """Returns the parameters, without the output layer's extra state.

        It is always None, and GPTModel.sharded_state_dict leaves it out, too.
        """
        state = super().sharded_state_dict(prefix, *arguments, **named)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


def _halves(
    layers: Sequence[ModuleSpec], first_block: int
) -> dict[int, TransformerLayerSubmodules]:
    """Split the specs of layers into those of their blocks, by number from `first_block` + 1."""
    halves = {}
    for index, layer in enumerate(layers):
        whole, number = layer.submodules, first_block + index * _BLOCKS
        halves[number + 1] = replace(
            whole, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
        )
        halves[number + 2] = replace(
            whole,
            input_layernorm=IdentityOp,
            self_attention=IdentityOp,
            self_attn_bda=IdentityFuncOp,
        )
    return halves


def build_hybrid(chunk: Chunk) -> LlamaModel:
    """Returns the chunk's model; Megatron-Core fills its parameters."""
    shape = chunk.shape
    module = LlamaModel(
        chunk.config,
        ModuleSpec(LlamaStack, submodules=chunk.layers),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=chunk.sequence_length,
        hybrid_layer_pattern=_pattern(chunk),
        pre_process=chunk.is_first,
        post_process=chunk.is_last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=chunk.virtual_stage,
    )
    if shape.rope_scaling_factor is not None:
        module.rotary_pos_emb = _stretched_rotary(shape, chunk.config)
    return module


def _pattern(chunk: Chunk) -> str:
    """Returns the kinds of all blocks of the whole model, with a bar between chunks."""
    config = chunk.config
    chunks = config.pipeline_model_parallel_size
    chunks *= config.virtual_pipeline_model_parallel_size or 1
    return Symbols.PIPE.join([_LAYER * len(chunk.layers.layer_specs)] * chunks)


def _stretched_rotary(shape: LlamaShape, config: TransformerConfig) -> RotaryEmbedding:
    """Returns Llama 3.1's rotary embedding, for which HybridModel has no argument."""
    return RotaryEmbedding(
        kv_channels=shape.head_size,
        rotary_percent=1.0,
        rotary_base=shape.rotary_base,
        rope_scaling=True,
        rope_scaling_factor=shape.rope_scaling_factor,
        use_cpu_initialization=config.use_cpu_initialization,
    )
