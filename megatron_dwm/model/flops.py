"""FLOPs of the LLM by formula: two for every multiply-add of a matrix product.

A token passes once through the weights of the layers and of the output layer. Its attention scores
and values cover the S / 2 positions that a causal token sees on average, or half the length of its
document's piece if attention stops at borders. Norms, biases, activations and embedding rows are
left out (below 1 %). A backward pass costs two forward passes.
"""

from __future__ import annotations

from megatron_dwm.model.shape import LlamaShape

FORWARD_BACKWARD = 3
"""cost of a forward and a backward pass together, in forward passes"""


def llm_forward_flops(
    shape: LlamaShape, samples: int, sequence_length: int, attended_tokens: float | None = None
) -> float:
    """FLOPs of one forward pass over `samples` rows of `sequence_length` tokens.

    attended_tokens: mean over tokens of the length inside which attention stays; None: the row.

    >>> from megatron_dwm.config import ModelConfig
    >>> from megatron_dwm.model.shape import resolve_shape
    >>> shape = resolve_shape(ModelConfig(preset="llama-1.3b"), 32000)
    >>> f"{llm_forward_flops(shape, samples=1, sequence_length=1024):.2e}"
    '2.72e+12'
    """
    weights = shape.num_layers * shape.layer_matrices
    output = shape.padded_vocab_size * shape.hidden_size
    reach = sequence_length if attended_tokens is None else attended_tokens
    attention = shape.num_layers * shape.num_attention_heads * shape.head_size * reach
    return 2.0 * samples * sequence_length * (weights + output + attention)
