"""Megatron-Core's own layers as a spec, with two modules that it lacks: a norm and attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_dwm.model.layers.context import PartialRows, attend_to_all_parts
from megatron_dwm.model.layers.fp8_emulation import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_dwm.model.layers.kernels import grouped_attention
from megatron_dwm.model.layers.pieces import Pieces, attend


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm of the last dimension (Zhang and Sennrich 2019).

    Replaces megatron.core.transformer.torch_norm.WrappedTorchNorm, which refuses sequence
    parallelism. Under it every rank normalizes its own part of the sequence, and Megatron sums the
    gradient of a scale that is marked `sequence_parallel` over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """Returns the input normalized and scaled, [..., D] as it came."""
        return F.rms_norm(hidden_SBD, self.weight.shape, self.weight, self.epsilon)


@dataclass
class PackedPieces(PackedSeqParams):
    """Pieces of documents on their way through the model's argument `packed_seq_params`.

    Megatron-Core hands the object on to every core attention, also when it recomputes. It leaves
    the shapes of the format "sbhd" alone, and takes the number of rotary positions from
    `max_seqlen`: here that is the window's length, because positions go on over borders.
    """

    pieces: Pieces = field(kw_only=True)


def packed_pieces(pieces: Pieces) -> PackedPieces:
    """Returns what the model takes as `packed_seq_params` for a micro-batch [B, S]."""
    length = pieces.row_length
    return PackedPieces(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, pieces=pieces)


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention on torch's fused kernel, which never forms the S x S matrix.

    Replaces megatron.core.transformer.dot_product_attention.DotProductAttention and takes the
    arguments with which SelfAttention builds and calls it. With `packed_seq_params` attention stops
    at the borders of documents (pieces.py), or goes on over the parts of other ranks (context.py).
    """

    def __init__(
        self,
        config: TransformerConfig,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.attention_dropout == 0.0
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "SelfAttention passes its groups on"
            self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedPieces | PartialRows | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns [S, B, heads * d]; query is [S, B, heads, d], key and value [S, B, groups, d]."""
        assert attention_mask is None, "the kernel applies the causal mask itself"
        if self.context_group is not None:
            assert isinstance(packed_seq_params, PartialRows), "it has the masks of the parts"
            masks = packed_seq_params.masks
            return attend_to_all_parts(query, key, value, masks, self.context_group)
        assert not isinstance(packed_seq_params, PartialRows)
        if packed_seq_params is not None and not packed_seq_params.pieces.are_rows:
            return attend(query, key, value, packed_seq_params.pieces.sequence_first).flatten(2)
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        out_BHSd = grouped_attention(query, key, value, is_causal=True)
        return out_BHSd.permute(2, 0, 1, 3).flatten(2)


def llama_block_spec(
    num_layers: int, fp8_layers: Collection[int] = (), *, qk_layernorm: bool = False
) -> TransformerBlockSubmodules:
    """Returns the spec of one chunk: layers of norm, attention, norm, SwiGLU, and a final norm.

    num_layers: layers of this chunk.  fp8_layers: those (from 0) that multiply in emulated FP8.
    qk_layernorm: with a norm over each head of queries and keys.
    """
    plain = _layer_spec(ColumnParallelLinear, RowParallelLinear, qk_layernorm)
    emulated = _layer_spec(Fp8ColumnParallelLinear, Fp8RowParallelLinear, qk_layernorm)
    layers = [emulated if number in fp8_layers else plain for number in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(
    column: type[ColumnParallelLinear], row: type[RowParallelLinear], qk_layernorm: bool
) -> ModuleSpec:
    norm_of_heads = RMSNorm if qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ScaledDotProductAttention,
            linear_proj=row,
            q_layernorm=norm_of_heads,
            k_layernorm=norm_of_heads,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
