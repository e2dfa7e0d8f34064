"""Bytes a token of a micro-batch that a forward pass keeps for the backward pass.

Tensors are counted one by one, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count the
s b h (34 + 5 a s / h) of a GPT layer. This is a Llama layer: it has no dropout, and its attention
never forms the S x S matrix. Their rule for parallelism holds: what lies between a column- and a
row-parallel product is divided by the tensor size, the rest only under sequence parallelism.

Unfused layers are the local spec on a CPU; tests compare them with what autograd saves, byte for
byte. Fused layers are Transformer Engine's norm and linear, counted from its source; they have not
been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape

_FP32 = 4
_FP8 = 1
# One id of the token, one of its label, one flag of the vocabulary's split.
_INDICES = 8 + 8 + 1


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """How a layer computes.

    value_bytes: bytes of one value of an activation.
    fused: norm and linear are Transformer Engine's.
    fp8: products read FP8 copies of their inputs.
    """

    value_bytes: int
    fused: bool
    fp8: bool = False

    @property
    def product_input_bytes(self) -> int:
        """Bytes of a value that is kept only for the weight gradient of a product."""
        return _FP8 if self.fp8 else self.value_bytes


def kernels_of(config: Config, *, on_gpu: bool) -> Kernels:
    """Returns how the layers of a configuration compute."""
    value_bytes = 4 if config.model.precision == "fp32" else 2
    fused = on_gpu and config.model.precision != "fp32"
    return Kernels(value_bytes=value_bytes, fused=fused, fp8=config.model.precision == "fp8")


def norm_bytes(width: float, tokens: float, kernels: Kernels) -> float:
    """Returns the bytes that a norm and its output keep; the next product reads the output.

    width: values in a row.  tokens: row statistics, one for each token that this rank holds.
    """
    statistics, read = _FP32 * tokens, kernels.product_input_bytes * width
    if kernels.fused:
        return kernels.value_bytes * width + statistics + read
    # torch keeps the input and the normalized input in fp32.
    return 2 * _FP32 * width + statistics + kernels.value_bytes * width


def layer_bytes(
    shape: LlamaShape, config: Config, kernels: Kernels, *, recompute: str | None = None
) -> float:
    """Returns the bytes a token that one layer keeps.

    recompute: replaces the configuration's `model.recompute`.
    """
    tensor, value = config.parallel.tensor, kernels.value_bytes
    recompute = recompute or config.model.recompute
    part = tensor if config.parallel.sequence else 1
    if recompute == "full":
        return value * shape.hidden_size / part
    heads, queries = shape.num_attention_heads, shape.num_attention_heads * shape.head_size
    keys, inner = shape.num_query_groups * shape.head_size, shape.ffn_hidden_size
    # The one product of queries, keys and values (values are a view of it), rotated queries and
    # keys, and the output of attention.
    if context_gathers(config, kernels):
        # Rotated queries, keys and values of whole rows, the output of either slice, and of both.
        attention = value * (3 * queries + 2 * keys * config.parallel.context) / tensor
    else:
        attention = value * 3 * (queries + keys) / tensor
    if kernels.fp8:
        attention += _FP8 * queries / tensor
    if recompute != "selective":
        attention += _FP32 * heads / tensor  # the softmax's denominators
    # Cosines and sines, one of each for queries and keys, shared by a micro-batch.
    rotation = 4 * value * shape.head_size / config.training.micro_batch_size
    # Gate and up projection; unfused, also silu of the gate, and the up projection plus an offset
    # of zero; then the input of the down projection.
    gated = 2 if kernels.fused else 4
    feed_forward = (gated * value + kernels.product_input_bytes) * inner / tensor
    norms = 2 * norm_bytes(shape.hidden_size / part, 1 / part, kernels)
    return norms + attention + rotation + feed_forward + _head_norm_bytes(shape, config, kernels)


def _head_norm_bytes(shape: LlamaShape, config: Config, kernels: Kernels) -> float:
    """Returns the bytes a token that the norms of queries' and keys' heads keep."""
    if not shape.qk_layernorm:
        return 0.0
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    queries, keys = heads * shape.head_size, groups * shape.head_size
    statistics = _FP32 * (heads + groups)
    if kernels.fused:
        kept = kernels.value_bytes * (queries + keys)
    else:
        kept = _FP32 * (queries + keys)  # the normalized input
        if kernels.value_bytes < _FP32:
            kept += _FP32 * (queries + keys)  # the input in fp32
        elif groups > config.parallel.tensor and heads > groups:
            kept += _FP32 * queries  # out of the groups; keys stay a view of the one product
        if kernels.value_bytes == _FP32 and context_gathers(config, kernels):
            kept += _FP32 * (queries + 2 * keys)  # that product, for the keys' sake
    return (kept + statistics) / config.parallel.tensor


def context_gathers(config: Config, kernels: Kernels) -> bool:
    """True if attention gathers the keys and values of whole rows (model/layers/context.py).

    Transformer Engine's passes them around instead, but it knows no borders there.
    """
    own_attention = not kernels.fused or config.masks_documents
    return config.parallel.context > 1 and own_attention


def mask_bytes(config: Config, kernels: Kernels) -> float:
    """Returns the bytes a token of the masks that all layers share (model/layers/context.py).

    The queries of slice s of 2 C see s + 1 slices of keys; with borders they may see fewer.
    """
    if not context_gathers(config, kernels):
        return 0.0
    context, rows = config.parallel.context, config.training.micro_batch_size
    keys = config.data.sequence_length * (2 * context + 1) / (4 * context)
    return kernels.value_bytes * keys / (1 if config.masks_documents else rows)


def head_bytes(shape: LlamaShape, config: Config, kernels: Kernels) -> float:
    """Returns the bytes a token that the last norm, output layer and cross-entropy keep."""
    part = config.parallel.tensor if config.parallel.sequence else 1
    # The output layer always computes in the activations' precision, never in FP8.
    plain = Kernels(value_bytes=kernels.value_bytes, fused=kernels.fused)
    norm = norm_bytes(shape.hidden_size / part, 1 / part, plain)
    softmax = _FP32 * shape.padded_vocab_size / config.parallel.tensor
    return norm + softmax + _INDICES


def encoder_bytes(width: int, inner: int, heads: int, layers: int, value_bytes: int) -> float:
    """Returns the bytes a token that the weighting model's own encoder keeps.

    The encoder is made of torch's own modules, and its residual stream is fp32.
    value_bytes: bytes of one value that its products read and write.
    """
    kernels = Kernels(value_bytes=value_bytes, fused=False)
    # Three projections, of which two are rotated; the output of attention in its own order and in
    # that of the next product; gate, up, silu and their product.
    products = value_bytes * (7 * width + 4 * inner) + _FP32 * heads
    # No product reads the last norm.
    last = norm_bytes(width, 1, kernels) - value_bytes * width
    return layers * (2 * norm_bytes(width, 1, kernels) + products) + last
