"""What a forward pass keeps for the backward pass, in bytes a token of a micro-batch.

Counted tensor by tensor as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count a GPT
layer's s b h (34 + 5 a s / h), for a Llama layer without dropout and with attention that never
forms the S x S matrix. Their rule for parallelism holds: what lies between a column- and a
row-parallel product is divided by the tensor size, the rest only under sequence parallelism.

`unfused` is the local spec on a CPU; tests hold it to what autograd really saves, byte for byte.
`fused` is Transformer Engine's norm and linear as its source saves them; it has not been measured.
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
    """How a layer computes. value_bytes: of an activation; fp8: products read FP8 copies."""

    value_bytes: int
    fused: bool
    fp8: bool = False

    @property
    def product_input_bytes(self) -> int:
        """Of a value that is kept only because a product's weight gradient needs it."""
        return _FP8 if self.fp8 else self.value_bytes


def kernels_of(config: Config, *, on_gpu: bool) -> Kernels:
    """What a configuration computes with."""
    value_bytes = 4 if config.model.precision == "fp32" else 2
    fused = on_gpu and config.model.precision != "fp32"
    return Kernels(value_bytes=value_bytes, fused=fused, fp8=config.model.precision == "fp8")


def norm_bytes(width: float, tokens: float, kernels: Kernels) -> float:
    """A norm with its output, which the next product reads; `tokens` counts the row statistics."""
    statistics, read = _FP32 * tokens, kernels.product_input_bytes * width
    if kernels.fused:
        return kernels.value_bytes * width + statistics + read
    # torch keeps the input and the normalised input in fp32.
    return 2 * _FP32 * width + statistics + kernels.value_bytes * width


def layer_bytes(
    shape: LlamaShape, config: Config, kernels: Kernels, *, recompute: str | None = None
) -> float:
    """Bytes a token that one layer keeps.

    recompute: in place of the configuration's `model.recompute`.
    """
    tensor, value = config.parallel.tensor, kernels.value_bytes
    recompute = recompute or config.model.recompute
    part = tensor if config.parallel.sequence else 1
    if recompute == "full":
        return value * shape.hidden_size / part
    heads, queries = shape.num_attention_heads, shape.num_attention_heads * shape.head_size
    keys, inner = shape.num_query_groups * shape.head_size, shape.ffn_hidden_size
    # Queries, keys and values as one product made them (the values are a view of it), rotated
    # queries and keys, the attention's output.
    attention = value * 3 * (queries + keys) / tensor
    if kernels.fp8:
        attention += _FP8 * queries / tensor
    if recompute != "selective":
        attention += _FP32 * heads / tensor  # the softmax's denominators
    # Cosines and sines, one of each for queries and keys, shared by a micro-batch.
    rotation = 4 * value * shape.head_size / config.training.micro_batch_size
    # Gate and up projection; unfused also silu of the gate, and the up projection plus an offset of
    # zero; then what the down projection reads.
    gated = 2 if kernels.fused else 4
    feed_forward = (gated * value + kernels.product_input_bytes) * inner / tensor
    norms = 2 * norm_bytes(shape.hidden_size / part, 1 / part, kernels)
    return norms + attention + rotation + feed_forward


def head_bytes(shape: LlamaShape, config: Config, kernels: Kernels) -> float:
    """Bytes a token that the last norm, the output layer and the cross-entropy keep."""
    part = config.parallel.tensor if config.parallel.sequence else 1
    # The output layer computes in the activations' precision, FP8 or not.
    plain = Kernels(value_bytes=kernels.value_bytes, fused=kernels.fused)
    norm = norm_bytes(shape.hidden_size / part, 1 / part, plain)
    softmax = _FP32 * shape.padded_vocab_size / config.parallel.tensor
    return norm + softmax + _INDICES


def encoder_bytes(width: int, inner: int, heads: int, layers: int, value_bytes: int) -> float:
    """Bytes a token that the weighting model's own encoder keeps (torch's own modules).

    value_bytes: of what its products read and make; the residual stream is fp32.
    """
    kernels = Kernels(value_bytes=value_bytes, fused=False)
    # Three projections, two of them rotated, attention's output in its own order and in the next
    # product's; gate, up, silu, product.
    products = value_bytes * (7 * width + 4 * inner) + _FP32 * heads
    # No product reads the last norm.
    last = norm_bytes(width, 1, kernels) - value_bytes * width
    return layers * (2 * norm_bytes(width, 1, kernels) + products) + last
