"""Names and layouts of Llama's parameters: Megatron-Core's and Hugging Face's.

The differences (H hidden, F inner width of the MLP, G query groups, q query heads a group, d head
width):

    linear_qkv  [G * (q + 2) * d, H]   group by group: its q query heads, its key, its value
                                       = q_proj [G * q * d, H], k_proj and v_proj [G * d, H]
    linear_fc1  [2 * F, H]             gate, then up = gate_proj, up_proj [F, H]
    embeddings  rows of padding at the end that Hugging Face does not have

The rotary embedding turns the same halves of a head on both sides, so no row of a head moves.
Pure functions; cost: one copy of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dwm.model.shape import LlamaShape

Parts = dict[str, Tensor]
"""Hugging Face's tensors by name, without the layer's prefix and `.weight`."""

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
    """One parameter of a Megatron layer as Hugging Face's `parts`; split and join are inverse."""

    parts: tuple[str, ...]
    split: Callable[[LlamaShape, Tensor], Parts]
    join: Callable[[LlamaShape, Parts], Tensor]


def split_qkv(shape: LlamaShape, qkv_CH: Tensor) -> Parts:
    """One layer's linear_qkv [G * (q + 2) * d, H] as its three projections."""
    groups, width = shape.num_query_groups, shape.head_size
    queries = shape.num_attention_heads // groups
    grouped = qkv_CH.view(groups, queries + 2, width, qkv_CH.shape[-1])
    parts = grouped.split([queries, 1, 1], dim=1)
    return {
        name: part.reshape(-1, qkv_CH.shape[-1]) for name, part in zip(_QKV, parts, strict=True)
    }


def join_qkv(shape: LlamaShape, parts: Parts) -> Tensor:
    """The inverse of `split_qkv`."""
    groups, width = shape.num_query_groups, shape.head_size
    grouped = [parts[name].view(groups, -1, width, shape.hidden_size) for name in _QKV]
    return torch.cat(grouped, dim=1).view(-1, shape.hidden_size)


def split_gate_up(shape: LlamaShape, fc1_CH: Tensor) -> Parts:
    """One layer's linear_fc1 [2 * F, H] as gate and up."""
    return dict(zip(_GATE_UP, fc1_CH.split(shape.ffn_hidden_size), strict=True))


def join_gate_up(_: LlamaShape, parts: Parts) -> Tensor:
    """The inverse of `split_gate_up`."""
    return torch.cat([parts[name] for name in _GATE_UP])


def _renamed(name: str) -> LayerTensor:
    return LayerTensor((name,), lambda _, tensor: {name: tensor}, lambda _, parts: parts[name])


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LAYER_TENSORS: dict[str, LayerTensor] = {
    "input_layernorm": _renamed("input_layernorm"),
    "self_attention.linear_qkv": LayerTensor(_QKV, split_qkv, join_qkv),
    "self_attention.linear_proj": _renamed("self_attn.o_proj"),
    "pre_mlp_layernorm": _renamed("post_attention_layernorm"),
    "mlp.linear_fc1": LayerTensor(_GATE_UP, split_gate_up, join_gate_up),
    "mlp.linear_fc2": _renamed("mlp.down_proj"),
}
"""Megatron's names of a layer's parameters, without the layer's prefix and `.weight`."""


def huggingface_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of `LlamaForCausalLM` by name, the output layer only where it is its own."""
    width, head = shape.hidden_size, shape.head_size
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (shape.ffn_hidden_size, width),
        "mlp.up_proj": (shape.ffn_hidden_size, width),
        "mlp.down_proj": (width, shape.ffn_hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        WHOLE_TENSORS[EMBEDDING]: (shape.vocab_size, width),
        **{
            f"model.layers.{number}.{name}.weight": size
            for number in range(shape.num_layers)
            for name, size in layer.items()
        },
        WHOLE_TENSORS[FINAL_NORM]: (width,),
    }
    if not shape.tied_embeddings:
        shapes[WHOLE_TENSORS[OUTPUT]] = (shape.vocab_size, width)
    return shapes


def megatron_tensor(shape: LlamaShape, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """The whole Megatron parameter of that global name, from Hugging Face's tensors.

    name: as in `initialise.global_parameter_names`, layers numbered through the model.
    read: gives Hugging Face's tensor of a name. Rows of padding are zero.
    """
    if name == OUTPUT and shape.tied_embeddings:
        name = EMBEDDING
    if name in WHOLE_TENSORS:
        tensor = read(WHOLE_TENSORS[name])
        return tensor if name == FINAL_NORM else _padded(shape, tensor)
    number, _, inner = name.removeprefix("decoder.layers.").partition(".")
    of_layer = LAYER_TENSORS[inner.removesuffix(".weight")]
    parts = {part: read(f"model.layers.{number}.{part}.weight") for part in of_layer.parts}
    return of_layer.join(shape, parts)


def megatron_names(shape: LlamaShape) -> Iterator[str]:
    """The global name of every parameter that Megatron-Core saves."""
    yield EMBEDDING
    for number in range(shape.num_layers):
        for name in LAYER_TENSORS:
            yield f"decoder.layers.{number}.{name}.weight"
    yield FINAL_NORM
    if not shape.tied_embeddings:
        yield OUTPUT


def megatron_sizes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor that Megatron-Core saves, by its name: layers lie in one stack."""
    width, layers = shape.hidden_size, shape.num_layers
    queries = shape.num_attention_heads * shape.head_size
    keys = shape.num_query_groups * shape.head_size
    of_layer = {
        "input_layernorm": (width,),
        "self_attention.linear_qkv": (queries + 2 * keys, width),
        "self_attention.linear_proj": (width, queries),
        "pre_mlp_layernorm": (width,),
        "mlp.linear_fc1": (2 * shape.ffn_hidden_size, width),
        "mlp.linear_fc2": (width, shape.ffn_hidden_size),
    }
    sizes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.padded_vocab_size, width),
        **{f"decoder.layers.{n}.weight": (layers, *size) for n, size in of_layer.items()},
        FINAL_NORM: (width,),
    }
    if not shape.tied_embeddings:
        sizes[OUTPUT] = (shape.padded_vocab_size, width)
    return sizes


def _padded(shape: LlamaShape, tensor_VH: Tensor) -> Tensor:
    missing = shape.padded_vocab_size - len(tensor_VH)
    if not missing:
        return tensor_VH
    return torch.cat([tensor_VH, tensor_VH.new_zeros(missing, tensor_VH.shape[1])])
