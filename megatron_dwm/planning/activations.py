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
    on_cpu: attention computes in fp32 (model/layers/kernels.py).
    """

    value_bytes: int
    fused: bool
    fp8: bool = False
    on_cpu: bool = False

    @property
    def product_input_bytes(self) -> int:
        """Bytes of a value that is kept only for the weight gradient of a product."""
        return _FP8 if self.fp8 else self.value_bytes

    @property
    def casts_attention(self) -> bool:
        """True if attention keeps its own copies, in fp32, of what it reads and gives."""
        return self.on_cpu and self.value_bytes < _FP32


def kernels_of(config: Config, *, on_gpu: bool) -> Kernels:
    """Returns how the layers of a configuration compute."""
    value_bytes = 4 if config.model.precision == "fp32" else 2
    fused = on_gpu and config.model.precision != "fp32"
    fp8 = config.model.precision == "fp8"
    return Kernels(value_bytes=value_bytes, fused=fused, fp8=fp8, on_cpu=not on_gpu)


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
    inner = shape.ffn_hidden_size
    attention = _attention_bytes(shape, config, kernels, again=recompute == "selective") / tensor
    # Cosines and sines, one of each for queries and keys, shared by a micro-batch.
    rotation = 4 * value * shape.head_size / config.training.micro_batch_size
    # Gate and up projection; unfused, also silu of the gate, and the up projection plus an offset
    # of zero; then the input of the down projection.
    gated = 2 if kernels.fused else 4
    feed_forward = (gated * value + kernels.product_input_bytes) * inner / tensor
    norms = 2 * norm_bytes(shape.hidden_size / part, 1 / part, kernels)
    return norms + attention + rotation + feed_forward + _head_norm_bytes(shape, config, kernels)


def _attention_bytes(shape: LlamaShape, config: Config, kernels: Kernels, *, again: bool) -> float:
    """Returns the bytes a token between the product of queries, keys and values and the next one.

    again: attention runs again in the backward pass, so only what it reads and gives is kept.
    """
    heads, value = shape.num_attention_heads, kernels.value_bytes
    queries, keys = heads * shape.head_size, shape.num_query_groups * shape.head_size
    context, gathers = config.parallel.context, context_gathers(config, kernels)
    if kernels.casts_attention and not again:
        # What it reads and gives, in fp32, and what it gives, in the activations' precision. The
        # queries of slice s of 2 C see s + 1 slices of keys; with borders they may see fewer.
        seen = keys * (2 * context + 1) / 2 if gathers else keys
        kept = _FP32 * (2 * queries + 2 * seen) + value * queries
    elif gathers:
        # Rotated queries, keys and values of whole rows, the output of either slice, and of both.
        kept = value * (3 * queries + 2 * keys * context)
    else:
        # The one product (values are a view of it), rotated queries and keys, and the output.
        kept = value * 3 * (queries + keys)
    if kernels.fp8:
        kept += _FP8 * queries
    return kept if again else kept + _FP32 * heads  # the softmax's denominators


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
    value = _FP32 if kernels.casts_attention else kernels.value_bytes
    return value * keys / (1 if config.masks_documents else rows)


def head_bytes(shape: LlamaShape, config: Config, kernels: Kernels) -> float:
    """Returns the bytes a token that the last norm, output layer and cross-entropy keep."""
    part = config.parallel.tensor if config.parallel.sequence else 1
    # The output layer always computes in the activations' precision, never in FP8.
    plain = Kernels(value_bytes=kernels.value_bytes, fused=kernels.fused)
    norm = norm_bytes(shape.hidden_size / part, 1 / part, plain)
    softmax = _FP32 * shape.padded_vocab_size / config.parallel.tensor
    return norm + softmax + _INDICES


def encoder_bytes(width: int, inner: int, heads: int, layers: int, kernels: Kernels) -> float:
    """Returns the bytes a token that the weighting model's own encoder keeps.

    The encoder is made of torch's own modules, and its residual stream is fp32.
    kernels: of the LLM; the encoder's products read and write values of as many bytes.
    """
    value = kernels.value_bytes
    # Three projections, of which two are rotated; the output of attention in its own order and in
    # that of the next product. Or what attention reads and gives in fp32, and that.
    attention = _FP32 * 4 * width + value * width if kernels.casts_attention else value * 7 * width
    # Gate, up, silu and their product.
    products = attention + value * 4 * inner + _FP32 * heads
    norm = norm_bytes(width, 1, Kernels(value_bytes=value, fused=False))
    # No product reads the last norm.
    return layers * (2 * norm + products) + norm - value * width
