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
Preset = Literal["tiny", "llama-370m", "llama-1.3b", "llama-2-7b", "llama-3-70b", "llama-3.1-405b"]

_IN_FP8 = ({"model.precision": ("fp8",)}, {"model.fp8_emulation": (True,)})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is split over processes; what is left of the world is data parallel."""

    tensor: int = key(1, WIDTH)
    """tensor-parallel size (processes)"""
    pipeline: int = key(1, WIDTH)
    """pipeline-parallel size (processes)"""
    virtual_stages: int = key(1, LAYERS)
    """model chunks on every pipeline stage; above 1 Megatron's interleaved schedule runs"""
    sequence: bool = False
    """sequence parallelism inside the tensor-parallel group"""
    sharded_optimizer: bool = False
    """shard the optimiser's state over the data-parallel group (Megatron's DistributedOptimizer)"""
    timeout_s: int = key(600, SECONDS)
    """seconds after which a collective that a dead rank never joined fails"""

    @property
    def model_size(self) -> int:
        """Processes that together hold one replica of the LLM."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The LLM; a field left empty takes the preset's value."""

    preset: Preset | None = None
    """shape to start from; empty takes model.init_from's, else tiny"""
    precision: Precision = "fp32"
    """arithmetic of parameters and activations; bf16 keeps fp32 main parameters; fp8 is bf16 with
    the layers' matrix products in FP8 (Transformer Engine on a GPU)"""
    fp8_recipe: Fp8Recipe = key("tensorwise", only=_IN_FP8)
    """how FP8 scales are found: from the maxima of earlier steps (delayed), of the tensor itself
    (tensorwise), of blocks of 128 (blockwise, Hopper on) or of 32 values (mxfp8, Blackwell on)"""
    fp8_first_last_bf16: bool = key(False, only=_IN_FP8)
    """keep the first and the last layer out of FP8 (not with fp8_recipe delayed)"""
    fp8_emulation: bool = False
    """FP8 numerics in the layers' matrix products without Transformer Engine, on a CPU too; slower
    than the products they stand for (fp8_recipe tensorwise)"""
    init_from: str | None = None
    """where the LLM's parameters come from: a Hugging Face directory (LlamaForCausalLM), or a
    checkpoint of an earlier run; the model then has that one's shape"""
    hidden_size: int | None = key(None, WIDTH)
    """width of the residual stream"""
    num_layers: int | None = key(None, LAYERS)
    """transformer layers"""
    num_attention_heads: int | None = key(None, WIDTH)
    """query heads"""
    num_query_groups: int | None = key(None, WIDTH)
    """key-value heads (grouped-query attention); equal to the query heads for plain attention"""
    ffn_hidden_size: int | None = key(None, INNER_WIDTH)
    """inner width of the SwiGLU block"""
    vocab_size: int | None = key(None, PIECES)
    """pieces in the vocabulary; empty takes the tokenizer's"""
    tied_embeddings: bool | None = None
    """share the input embedding with the output layer"""
    rotary_base: float | None = key(None, FACTOR_ABOVE_ZERO)
    """base of the rotary position embedding"""
    norm_epsilon: float | None = key(None, EPSILON)
    """epsilon of RMSNorm"""
    init_std: float | None = key(None, DEVIATION, only={"model.init_from": (None,)})
    """standard deviation of the normal initialisation"""
    recompute: Literal["none", "selective", "full"] = "none"
    """recompute activations in the backward pass: nothing, core attention, or whole layers"""

    @property
    def uses_fp8(self) -> bool:
        """Whether the layers' matrix products are asked for in FP8, emulated or not."""
        return self.precision == "fp8" or self.fp8_emulation


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The LLM's optimiser and the loop."""

    steps: int = key(1000, COUNT)
    """optimiser steps"""
    global_batch_size: int = key(32, ROWS)
    """samples in one optimiser step, over all processes"""
    micro_batch_size: int = key(32, ROWS)
    """samples in one forward pass of one process"""
    learning_rate: float = key(3e-3, RATE)
    """peak learning rate"""
    min_learning_rate_fraction: float = key(0.1, WHOLE_FRACTION)
    """fraction of the peak that the cosine reaches with the last step; 1 keeps the rate constant"""
    warmup_fraction: float = key(0.05, FRACTION)
    """fraction of the steps over which the learning rate rises linearly: of W steps, step k has k/W
    of the peak (Megatron-LM: (k - 1)/W, so that its first step changes nothing)"""
    weight_decay: float = key(0.1, DECAY)
    """decoupled weight decay (norms and biases are exempt)"""
    clip_grad: float = key(1.0, FACTOR)
    """largest global gradient norm; 0 switches clipping off"""
    adam_beta1: float = key(0.9, FRACTION)
    """decay of the first moment"""
    adam_beta2: float = key(0.95, FRACTION)
    """decay of the second moment"""
    adam_epsilon: float = key(1e-8, EPSILON)
    """epsilon of Adam"""
    checkpoint_interval_steps: int = key(500, COUNT_OR_ZERO)
    """steps between checkpoints; inside a weighting phase of several updates, updates between them
    too; the last step always writes one; 0 writes only that"""
    checkpoint_async: bool = False
    """write checkpoints beside training, which stands still only for a copy to host memory"""
    keep_last: int = key(0, COUNT_OR_ZERO)
    """checkpoints that are kept, the newest, inside weighting phases or not; 0 keeps all"""
    keep_every: int = key(0, COUNT_OR_ZERO, only={"training.keep_last": SET})
    """checkpoints at multiples of this many steps are kept besides; 0 keeps none besides"""
    max_skipped_steps: int = key(5, COUNT_OR_ZERO)
    """steps in a row that are skipped because their loss or gradient norm is not finite; one more
    stops the run"""
    spike_factor: float = key(0.0, FACTOR_ABOVE_ONE)
    """a loss above this many times its running mean takes the run back to the last checkpoint and
    passes over the batch; more than max_skipped_steps of them in a row stop the run; 0 switches it
    off"""
    log_interval_steps: int = key(10, COUNT)
    """steps between lines on the terminal when it is not interactive"""
