"""The sections of the LLM: its layout over processes, its shape and its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.bounds import (
    COUNT,
    COUNT_OR_ZERO,
    DECAY,
    DEVIATION,
    EPSILON,
    FACTOR,
    FACTOR_ABOVE_ONE,
    FACTOR_ABOVE_ZERO,
    FRACTION,
    INNER_WIDTH,
    LAYERS,
    PIECES,
    RATE,
    ROWS,
    SECONDS,
    WHOLE_FRACTION,
    WIDTH,
)
from megatron_dwm.config.key import SET, key

Precision = Literal["fp32", "bf16", "fp8"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Builder = Literal["gpt", "hybrid"]
Preset = Literal[
    "tiny",
    "llama-370m",
    "llama-1.3b",
    "llama-2-7b",
    "llama-3-70b",
    "llama-3.1-405b",
    "qwen3-0.6b",
    "qwen3-1.7b",
]

_BELOW_FP32 = {"model.precision": ("bf16", "fp8")}
_IN_FP8 = ({"model.precision": ("fp8",)}, {"model.fp8_emulation": (True,)})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the LLM is split over processes; the remaining factor of the job is data parallel."""

    tensor: int = key(1, WIDTH)
    """processes in a tensor-parallel group"""
    context: int = key(1, WIDTH)
    """processes that share each sample's tokens, every one with two slices of it (Megatron's
    --context-parallel-size)"""
    pipeline: int = key(1, WIDTH)
    """processes in a pipeline"""
    virtual_stages: int = key(1, LAYERS)
    """model chunks on every pipeline stage; above 1, Megatron's interleaved schedule runs"""
    sequence: bool = False
    """sequence parallelism inside the tensor-parallel group"""
    sharded_optimizer: bool = False
    """shard the optimizer's state over the processes with the same parameters (Megatron's
    DistributedOptimizer)"""
    overlap_grad_reduce: bool = False
    """reduce gradients over the processes with the same parameters during the last backward pass of
    a step, bucket by bucket (Megatron's --overlap-grad-reduce)"""
    overlap_param_gather: bool = False
    """gather the parameters that other replicas stepped during the next forward pass (Megatron's
    --overlap-param-gather); needs parallel.sharded_optimizer and parallel.overlap_grad_reduce"""
    ddp_bucket_size: int | None = key(None, COUNT, only={"parallel.overlap_grad_reduce": (True,)})
    """parameters in a bucket (Megatron's --ddp-bucket-size); empty means 40 million, or 1 million
    for each replica if that is more. Pipeline stages after the first have one bucket"""
    grad_reduce_in_fp32: bool = key(True, only=_BELOW_FP32)
    """accumulate and reduce gradients in fp32; false does so in bf16 (Megatron's
    --grad-reduce-in-bf16), with half the bytes and a rounding in every addition"""
    tp_comm_overlap: bool = key(False, only={"parallel.sequence": (True,), **_BELOW_FP32})
    """overlap tensor-parallel messages with the matrix products (Megatron's --tp-comm-overlap); for
    Transformer Engine's layers on GPUs only (docs/gpu.md; not run)"""
    timeout_s: int = key(600, SECONDS)
    """seconds that a rank waits for the others in a collective before it fails"""

    @property
    def model_size(self) -> int:
        """Processes that together train one replica of the LLM."""
        return self.tensor * self.context * self.pipeline


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The LLM; an empty key has the preset's value."""

    preset: Preset | None = None
    """shape to start from; empty means the shape of model.init_from, or tiny without it"""
    precision: Precision = "fp32"
    """precision of parameters and activations; bf16 has fp32 main parameters in the optimizer; fp8
    is bf16 with the matrix products of the layers in FP8 (Transformer Engine on a GPU)"""
    fp8_recipe: Fp8Recipe = key("tensorwise", only=_IN_FP8)
    """how FP8 scales are computed: from the maxima of earlier steps (delayed), of the whole tensor
    (tensorwise), of blocks of 128 values (blockwise; Hopper or newer) or of 32 values (mxfp8;
    Blackwell or newer)"""
    fp8_first_last_bf16: bool = key(False, only=_IN_FP8)
    """keep the first and the last layer out of FP8 (not with fp8_recipe delayed)"""
    fp8_emulation: bool = False
    """emulate FP8 rounding in the layers' matrix products, without Transformer Engine and also on a
    CPU; slower than products without it (needs fp8_recipe tensorwise)"""
    init_from: str | None = None
    """initial parameters of the LLM: a Hugging Face directory (Llama, Mistral, Qwen2 or Qwen3;
    docs/huggingface.md), a checkpoint of an earlier run, or one of Megatron-LM or Megatron-Bridge
    (docs/megatron.md); the LLM then has that model's shape"""
    init_optimizer: bool = key(False, only={"model.init_from": SET})
    """also take Adam's moments and step count from model.init_from, a checkpoint of a run or of
    Megatron-LM that has them; the learning rate follows this run's schedule"""
    hidden_size: int | None = key(None, WIDTH)
    """width of the residual stream"""
    num_layers: int | None = key(None, LAYERS)
    """transformer layers"""
    num_attention_heads: int | None = key(None, WIDTH)
    """query heads"""
    num_query_groups: int | None = key(None, WIDTH)
    """key-value heads (grouped-query attention); as many as query heads for plain attention"""
    kv_channels: int | None = key(None, WIDTH)
    """width of one head (Megatron's --kv-channels); empty means hidden_size / num_attention_heads,
    or the preset's width if it has one of its own"""
    qk_layernorm: bool | None = None
    """RMSNorm over each head of queries and keys, as in Qwen3 (Megatron's --qk-layernorm)"""
    add_qkv_bias: bool | None = None
    """a bias on queries, keys and values, as in Qwen2 (Megatron's --add-qkv-bias)"""
    ffn_hidden_size: int | None = key(None, INNER_WIDTH)
    """inner width of the SwiGLU block"""
    vocab_size: int | None = key(None, PIECES)
    """tokens in the vocabulary; empty means the tokenizer's size"""
    tied_embeddings: bool | None = None
    """share the input embedding with the output layer"""
    rotary_base: float | None = key(None, FACTOR_ABOVE_ZERO)
    """base of the rotary position embedding"""
    norm_epsilon: float | None = key(None, EPSILON)
    """epsilon of RMSNorm"""
    init_std: float | None = key(None, DEVIATION, only={"model.init_from": (None,)})
    """standard deviation of the normal initialization"""
    builder: Builder = "gpt"
    """class of Megatron-Core that the LLM is built from: GPTModel, or HybridModel with a block of
    attention and one of MLP for each layer (Megatron-Core 0.18 or newer); both train alike and read
    the same checkpoints"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations that the backward pass recomputes: none, of core attention (selective), or of
    whole layers (full)"""

    cross_entropy_loss_fusion: bool = key(False, only=_BELOW_FP32)
    """compute the loss from vocabulary-parallel logits with Megatron's fused functions, which torch
    compiles on a GPU and runs one by one elsewhere (Megatron's --cross-entropy-loss-fusion)"""
    apply_rope_fusion: bool = key(False, only=_BELOW_FP32)
    """apply rotary position embeddings with Transformer Engine's kernel, in its layers only (in
    Megatron-LM it is on unless --no-rope-fusion; not run)"""

    @property
    def uses_fp8(self) -> bool:
        """True if the layers' matrix products are in FP8, emulated or not."""
        return self.precision == "fp8" or self.fp8_emulation


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The LLM's optimizer, the training loop and its checkpoints."""

    steps: int = key(1000, COUNT)
    """optimizer steps"""
    global_batch_size: int = key(32, ROWS)
    """samples in one optimizer step, over all processes"""
    micro_batch_size: int = key(32, ROWS)
    """samples in one forward pass of one process"""
    learning_rate: float = key(3e-3, RATE)
    """peak learning rate"""
    min_learning_rate_fraction: float = key(0.1, WHOLE_FRACTION)
    """learning rate of the last step, where the cosine ends, as a fraction of the peak; 1 keeps the
    rate constant"""
    warmup_fraction: float = key(0.05, FRACTION)
    """fraction of the steps in which the learning rate rises linearly: in a warm-up of W steps,
    step k has k/W of the peak (in Megatron-LM (k - 1)/W, so that its first step changes nothing)"""
    weight_decay: float = key(0.1, DECAY)
    """decoupled weight decay (not of norms and biases)"""
    clip_grad: float = key(1.0, FACTOR)
    """largest global gradient norm; 0 switches clipping off"""
    adam_beta1: float = key(0.9, FRACTION)
    """decay of the first moment"""
    adam_beta2: float = key(0.95, FRACTION)
    """decay of the second moment"""
    adam_epsilon: float = key(1e-8, EPSILON)
    """epsilon of Adam"""
    checkpoint_interval_steps: int = key(500, COUNT_OR_ZERO)
    """steps between checkpoints, and updates between checkpoints inside a weighting phase of
    several updates; the last step always writes a checkpoint; 0 writes only that one"""
    checkpoint_async: bool = False
    """write checkpoints in the background; training waits only for a copy to host memory"""
    keep_last: int = key(0, COUNT_OR_ZERO)
    """number of newest checkpoints to keep, those inside weighting phases included; 0 keeps all"""
    keep_every: int = key(0, COUNT_OR_ZERO, only={"training.keep_last": SET})
    """also keep checkpoints at multiples of this many steps; 0 keeps only the newest"""
    max_skipped_steps: int = key(5, COUNT_OR_ZERO)
    """consecutive steps that may be skipped because the loss or the gradient norm is not finite;
    one more stops the run"""
    spike_factor: float = key(0.0, FACTOR_ABOVE_ONE)
    """if the loss exceeds this many times its running mean, the run returns to the last checkpoint
    and skips the batch; more than max_skipped_steps of them in a row stop the run; 0 switches it
    off"""
    log_interval_steps: int = key(10, COUNT)
    """steps between lines of output if there is no interactive terminal"""
