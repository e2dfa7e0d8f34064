"""Names and layouts of Llama's parameters: Megatron-Core's to Hugging Face's.

The differences (H hidden, F inner width of the MLP, G query groups, d head width, L layers):

    linear_qkv  [L, G * (q + 2) * d, H]   group by group: its q query heads, its key, its value
                                          -> q_proj [G * q * d, H], k_proj and v_proj [G * d, H]
    linear_fc1  [L, 2 * F, H]             gate, then up -> gate_proj, up_proj [F, H]
    embeddings  padded rows at the end    -> cut to the vocabulary

The rotary embedding turns the same halves of a head on both sides, so no row of a head moves.
Pure functions; cost: one copy of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from megatron_dwm.model import LlamaShape

Read = Callable[[str], Tensor]
"""The tensor that Megatron calls by that name, layers stacked along a leading axis."""


def huggingface_tensors(shape: LlamaShape, read: Read) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `LlamaForCausalLM`.

    With tied embeddings `lm_head.weight` is the very tensor of the input embedding. Reads one
    Megatron tensor at a time; what comes out does not keep it alive.
    """
    embedding_VH = read("embedding.word_embeddings.weight")[: shape.vocab_size].clone()
    yield "model.embed_tokens.weight", embedding_VH
    for source, split in _LAYER_TENSORS.items():
        stacked = read(f"decoder.layers.{source}.weight")
        assert stacked.shape[0] == shape.num_layers, (source, stacked.shape)
        for layer, tensor in enumerate(stacked):
            for name, part in split(shape, tensor).items():
                yield f"model.layers.{layer}.{name}.weight", part.clone()
    yield "model.norm.weight", read("decoder.final_layernorm.weight")
    if shape.tied_embeddings:
        yield "lm_head.weight", embedding_VH
    else:
        yield "lm_head.weight", read("output_layer.weight")[: shape.vocab_size].clone()


def num_huggingface_tensors(shape: LlamaShape) -> int:
    """How many pairs `huggingface_tensors` gives."""
    return 9 * shape.num_layers + 3


def split_qkv(shape: LlamaShape, qkv_CH: Tensor) -> dict[str, Tensor]:
    """One layer's linear_qkv [G * (q + 2) * d, H] as its three projections."""
    groups, width = shape.num_query_groups, shape.head_size
    queries = shape.num_attention_heads // groups
    grouped = qkv_CH.view(groups, queries + 2, width, qkv_CH.shape[-1])
    parts = grouped.split([queries, 1, 1], dim=1)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return {
        name: part.reshape(-1, qkv_CH.shape[-1]) for name, part in zip(names, parts, strict=True)
    }


def split_gate_up(shape: LlamaShape, fc1_CH: Tensor) -> dict[str, Tensor]:
    """One layer's linear_fc1 [2 * F, H] as gate and up."""
    gate_FH, up_FH = fc1_CH.split(shape.ffn_hidden_size)
    return {"mlp.gate_proj": gate_FH, "mlp.up_proj": up_FH}


def _renamed(name: str) -> Callable[[LlamaShape, Tensor], dict[str, Tensor]]:
    return lambda _, tensor: {name: tensor}


_LAYER_TENSORS: dict[str, Callable[[LlamaShape, Tensor], dict[str, Tensor]]] = {
    "input_layernorm": _renamed("input_layernorm"),
    "self_attention.linear_qkv": split_qkv,
    "self_attention.linear_proj": _renamed("self_attn.o_proj"),
    "pre_mlp_layernorm": _renamed("post_attention_layernorm"),
    "mlp.linear_fc1": split_gate_up,
    "mlp.linear_fc2": _renamed("mlp.down_proj"),
}
