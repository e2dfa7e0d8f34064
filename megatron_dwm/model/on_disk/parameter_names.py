"""Names and layouts of Llama's parameters: Megatron-Core's and Hugging Face's.

The differences (D hidden size, F inner width of the MLP, G query groups, q query heads per group, d
width of a head):

    linear_qkv  [G * (q + 2) * d, D]   group by group: its q query heads, its key, its value
                                       = q_proj [G * q * d, D], k_proj and v_proj [G * d, D];
                                       its bias, if there is one, in the same way
    linear_fc1  [2 * F, D]             gate, then up = gate_proj, up_proj [F, D]
    embeddings  rows of padding at the end that Hugging Face does not have

Both rotate the same halves of a head, so the rows of a head keep their order. Pure functions; cost:
one copy of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dwm.model.shape import LlamaShape

Parts = dict[str, Tensor]
"""Hugging Face's tensors by name, without the layer's prefix and `.weight` or `.bias`."""

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"

WHOLE_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
"""Megatron's names of the parameters outside the layers, and Hugging Face's."""


@dataclass(frozen=True)
class LayerTensor:
    """One parameter of a Megatron layer as Hugging Face's `parts`; `join` inverts `split`."""

    parts: tuple[str, ...]
    split: Callable[[LlamaShape, Tensor], Parts]
    join: Callable[[LlamaShape, Parts], Tensor]


def split_qkv(shape: LlamaShape, qkv_CD: Tensor) -> Parts:
    """Split one layer's linear_qkv [G * (q + 2) * d, D], or its bias, into three projections."""
    groups, width = shape.num_query_groups, shape.head_size
    queries, columns = shape.num_attention_heads // groups, qkv_CD.shape[1:]
    grouped = qkv_CD.view(groups, queries + 2, width, *columns)
    parts = grouped.split([queries, 1, 1], dim=1)
    return {name: part.reshape(-1, *columns) for name, part in zip(_QKV, parts, strict=True)}


def join_qkv(shape: LlamaShape, parts: Parts) -> Tensor:
    """Join three projections into one layer's linear_qkv; the inverse of `split_qkv`."""
    groups, width = shape.num_query_groups, shape.head_size
    columns = parts[_QKV[0]].shape[1:]
    grouped = [parts[name].view(groups, -1, width, *columns) for name in _QKV]
    return torch.cat(grouped, dim=1).view(-1, *columns)


def split_gate_up(shape: LlamaShape, fc1_CD: Tensor) -> Parts:
    """Split one layer's linear_fc1 [2 * F, D] into gate and up."""
    return dict(zip(_GATE_UP, fc1_CD.split(shape.ffn_hidden_size), strict=True))


def join_gate_up(_: LlamaShape, parts: Parts) -> Tensor:
    """Join gate and up into one layer's linear_fc1; the inverse of `split_gate_up`."""
    return torch.cat([parts[name] for name in _GATE_UP])


def _renamed(name: str) -> LayerTensor:
    return LayerTensor((name,), lambda _, tensor: {name: tensor}, lambda _, parts: parts[name])


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LAYER_TENSORS: dict[str, LayerTensor] = {
    "input_layernorm": _renamed("input_layernorm"),
    "self_attention.linear_qkv": LayerTensor(_QKV, split_qkv, join_qkv),
    "self_attention.q_layernorm": _renamed("self_attn.q_norm"),
    "self_attention.k_layernorm": _renamed("self_attn.k_norm"),
    "self_attention.linear_proj": _renamed("self_attn.o_proj"),
    "pre_mlp_layernorm": _renamed("post_attention_layernorm"),
    "mlp.linear_fc1": LayerTensor(_GATE_UP, split_gate_up, join_gate_up),
    "mlp.linear_fc2": _renamed("mlp.down_proj"),
}
"""Megatron's names of a layer's modules, and how each one's weight or bias is in Hugging Face's"""


def huggingface_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Returns the size of every parameter of Hugging Face's model; a tied output layer has none."""
    width, head = shape.hidden_size, shape.head_size
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (shape.ffn_hidden_size, width),
        "mlp.up_proj.weight": (shape.ffn_hidden_size, width),
        "mlp.down_proj.weight": (width, shape.ffn_hidden_size),
    }
    if shape.add_qkv_bias:
        sizes = (queries, keys, keys)
        layer |= {f"{name}.bias": (size,) for name, size in zip(_QKV, sizes, strict=True)}
    if shape.qk_layernorm:
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    shapes: dict[str, tuple[int, ...]] = {
        WHOLE_TENSORS[EMBEDDING]: (shape.vocab_size, width),
        **{
            f"model.layers.{number}.{name}": size
            for number in range(shape.num_layers)
            for name, size in layer.items()
        },
        WHOLE_TENSORS[FINAL_NORM]: (width,),
    }
    if not shape.tied_embeddings:
        shapes[WHOLE_TENSORS[OUTPUT]] = (shape.vocab_size, width)
    return shapes


def megatron_tensor(shape: LlamaShape, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """Returns the whole Megatron parameter of a global name, from Hugging Face's tensors.

    name: as in `initialize.global_parameter_names`, with layer numbers of the whole model.
    read: returns Hugging Face's tensor of a name. Rows of padding are zero.
    """
    if name == OUTPUT and shape.tied_embeddings:
        name = EMBEDDING
    if name in WHOLE_TENSORS:
        tensor = read(WHOLE_TENSORS[name])
        return tensor if name == FINAL_NORM else _padded(shape, tensor)
    number, _, inner = name.removeprefix("decoder.layers.").partition(".")
    module, _, kind = inner.rpartition(".")
    of_layer = LAYER_TENSORS[module]
    parts = {part: read(f"model.layers.{number}.{part}.{kind}") for part in of_layer.parts}
    return of_layer.join(shape, parts)


def layer_sizes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Returns the size of every parameter of a Megatron layer, by name without the prefix."""
    width, head = shape.hidden_size, shape.head_size
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    sizes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attention.linear_qkv.weight": (queries + 2 * keys, width),
        "self_attention.linear_proj.weight": (width, queries),
        "pre_mlp_layernorm.weight": (width,),
        "mlp.linear_fc1.weight": (2 * shape.ffn_hidden_size, width),
        "mlp.linear_fc2.weight": (width, shape.ffn_hidden_size),
    }
    if shape.add_qkv_bias:
        sizes["self_attention.linear_qkv.bias"] = (queries + 2 * keys,)
    if shape.qk_layernorm:
        sizes |= {f"self_attention.{name}_layernorm.weight": (head,) for name in ("q", "k")}
    return sizes


def megatron_sizes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Returns the size of every tensor that Megatron-Core saves; it stacks the layers in one."""
    width, layers = shape.hidden_size, shape.num_layers
    sizes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.padded_vocab_size, width),
        **{f"decoder.layers.{name}": (layers, *size) for name, size in layer_sizes(shape).items()},
        FINAL_NORM: (width,),
    }
    if not shape.tied_embeddings:
        sizes[OUTPUT] = (shape.padded_vocab_size, width)
    return sizes


def _padded(shape: LlamaShape, tensor_VD: Tensor) -> Tensor:
    missing = shape.padded_vocab_size - len(tensor_VD)
    if not missing:
        return tensor_VD
    return torch.cat([tensor_VD, tensor_VD.new_zeros(missing, tensor_VD.shape[1])])
