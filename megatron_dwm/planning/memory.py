"""Memory of one rank by part, and its peak over the moments of a run.

    always    weights, gradient buffers, optimizer state, FP8 copies, weighting model
    step      always + activations + tensors that the backward pass works on
    update    step + the virtual step's copies (bilevel/virtual_step.py): g, and theta if no fp32
              main parameters hold that copy; or z, if it comes before the step (bilevel/ahead.py);
              and, for sketches of the units' steps, the Jacobian, buckets and signed factors
              (bilevel/sketch.py), and the sketches
    weighting always + activations of the weighting model, after the LLM's are freed; they are those
              of one micro-batch, because weighting/encoding.py encodes one at a time

Bytes a parameter of the first three parts are those in Megatron-LM's documentation for fp32
gradients: 16, or 8 + 8/d sharded, in fp32; 18, or 6 + 12/d, in bf16; and with gradients in bf16,
too: 20, or 4 + 16/d, since the optimizer makes an fp32 copy of them. On a GPU Adam is assumed to be
fused; torch's own Adam would keep temporary copies of everything there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape
from megatron_dwm.planning.activations import (
    Kernels,
    encoder_bytes,
    head_bytes,
    kernels_of,
    layer_bytes,
    mask_bytes,
)
from megatron_dwm.planning.placement import RankParameters, layers_in_flight, rank_parameters
from megatron_dwm.weighting import learns, method_class
from megatron_dwm.weighting.model import WeightingShape
from megatron_dwm.weighting.noise import why_no_noise

_FP32 = 4
_MOMENTS = 2 * _FP32
# AdamW's two moments, the parameters, and the gradient, the sum and the last update's gradient. A
# frozen model is only its parameters.
_WEIGHTING_BYTES = _MOMENTS + 4 * _FP32
# The Jacobian, a signed factor and a bucket for every parameter.
_SKETCHING_BYTES = 12
# Both orientations of a weight in FP8; mxfp8 has a scale for every 32 values.
_FP8_COPIES = {"delayed": 2.0, "tensorwise": 2.0, "blockwise": 2.0, "mxfp8": 2.0 * 33 / 32}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank of a pipeline stage. The first six parts are held at all times.

    reference_on_host: of a reference that waits in host memory. reference_in_use: on the device
    while it is used, with its activations if it learns; a forward pass alone keeps none.
    """

    weights: float
    gradients: float
    optimizer: float
    fp8_copies: float
    weighting_model: float
    reference: float
    reference_on_host: float
    reference_in_use: float
    activations: float
    working: float
    virtual_step: float
    sketches: float
    weighting_activations: float

    @property
    def always(self) -> float:
        """Bytes that are held from the first step to the last."""
        of_llm = self.weights + self.gradients + self.optimizer + self.fp8_copies
        return of_llm + self.weighting_model + self.reference

    @property
    def step(self) -> float:
        """Peak bytes of an LLM step."""
        return self.always + self.activations + self.working

    @property
    def update(self) -> float:
        """Peak bytes of a weighting update; those of a step if there is none."""
        of_passes = self.step + self.virtual_step + self.sketches
        between = max(self.weighting_activations, self.reference_in_use)
        return max(of_passes, self.always + between)

    def rows(self) -> dict[str, float]:
        """Returns the bytes of every part, and the two peaks, by name."""
        return {**asdict(self), "step": self.step, "update": self.update}


def stage_memory(
    config: Config,
    shape: LlamaShape,
    weighting: WeightingShape | None,
    reference_shape: LlamaShape | None = None,
    *,
    world_size: int,
    stage: int,
    on_gpu: bool,
) -> Memory:
    """Returns the memory of one rank of pipeline stage `stage` (from 0).

    weighting: None without a weighting model.
    reference_shape: of the reference model, if there is one; None: that of the LLM.
    """
    found = rank_parameters(shape, config.parallel, stage)
    replicas = config.data_parallel_size(world_size)
    shards = config.gradient_ranks(world_size) if config.parallel.sharded_optimizer else 1
    kernels = kernels_of(config, on_gpu=on_gpu)
    mixed = config.model.precision != "fp32"
    state = (_MOMENTS + (_FP32 if mixed else 0)) * found.total / shards
    copies = (1 if mixed else 2) * _FP32 * found.total / shards
    of_weighting = _WEIGHTING_BYTES if has_updates(config) else _FP32
    weights = kernels.value_bytes * found.total
    gradients = (gradient_bytes(config) + _main_gradient_bytes(config) / shards) * found.total
    parts = method_class(config).parts(config)
    is_stored = config.policy.reference_losses is not None  # its losses are read from files
    of_reference = reference_shape or shape
    held = rank_parameters(of_reference, config.parallel, stage)
    its_weights = kernels.value_bytes * held.total
    reference = its_weights if "reference" in parts and not is_stored else 0.0
    if "dynamic_reference" in parts:
        reference = weights + gradients + state
    activations = _activations(config, shape, world_size, stage, on_gpu)
    working = _working(config, shape, found, on_gpu)
    its_working = _working(config, of_reference, held, on_gpu)
    offloads = config.policy.offload_reference and reference > 0.0
    learns_itself = "dynamic_reference" in parts
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        fp8_copies=_fp8_copies(config, shape, found, stage),
        weighting_model=float(of_weighting * weighting_parameters(weighting)),
        reference=0.0 if offloads else reference,
        # Gradients are zero between uses, and have no copy.
        reference_on_host=(reference - learns_itself * gradients) if offloads else 0.0,
        reference_in_use=(reference + its_working + learns_itself * activations)
        if offloads
        else 0.0,
        activations=activations,
        working=working,
        virtual_step=_update_copies(config, found.total, copies, replicas),
        sketches=_sketch_bytes(config, shape, found, replicas),
        weighting_activations=_weighting_activations(config, weighting, world_size, kernels),
    )


def has_updates(config: Config) -> bool:
    """True if the run is long enough for a weighting update."""
    return learns(config) and method_class(config).schedule(config).num_updates > 0


def gradient_bytes(config: Config) -> int:
    """Returns the bytes of a value in the gradient buffers, and in their reduction."""
    in_fp32 = config.parallel.grad_reduce_in_fp32 or config.model.precision == "fp32"
    return _FP32 if in_fp32 else 2


def _main_gradient_bytes(config: Config) -> int:
    """Returns the bytes of the optimizer's copy of a gradient; in fp32 it is the buffer itself."""
    return 0 if gradient_bytes(config) == _FP32 else _FP32


def _update_copies(config: Config, parameters: int, copies: float, replicas: int) -> float:
    """Returns the bytes of the virtual step's copies, or of directions that come before the step.

    A measurement of noise has two directions, one for each half of the passages.
    """
    method = method_class(config)
    parts = method.parts(config)
    if has_updates(config) and method.schedule(config).ahead:
        value_bytes = 2 if config.keeps_direction_in_bf16 else _FP32
        noise = config.bilevel.noise_interval_updates > 0
        measured = noise and why_no_noise(config, config.passages, replicas) is None
        return float(value_bytes * parameters * (2 if measured else 1))
    through_pools = "sampling" in parts and config.policy.jacobian == "exact"
    return copies if has_updates(config) or through_pools else 0.0


def _sketch_bytes(config: Config, shape: LlamaShape, found: RankParameters, replicas: int) -> float:
    """Returns the bytes of sketching the units' steps, a sample each, in one update or pool."""
    policy, method = config.policy, method_class(config)
    if "redundancy" not in method.parts(config) or not policy.redundancy:
        return 0.0
    samples = method.pool_batches(config) * config.training.global_batch_size / replicas
    size = policy.sketch_size or shape.num_parameters()
    return _SKETCHING_BYTES * found.total + _FP32 * samples * size


def weighting_parameters(shape: WeightingShape | None) -> int:
    """Returns the number of parameters of a weighting model; 0 without one."""
    if shape is None:
        return 0
    width = shape.hidden_size
    layer = 4 * width * width + 3 * width * shape.ffn_hidden_size + 2 * width
    across = layer + width + 1 if shape.across_samples else 0
    if shape.encoder == "own":
        reading = shape.vocab_size * width + shape.num_layers * layer + width
    else:
        # Two pooled states of the LLM and the loss, with a bias.
        reading = (2 * shape.feature_size + 2) * width
    return reading + across + width + 1


def _fp8_copies(config: Config, shape: LlamaShape, found: RankParameters, stage: int) -> float:
    """Returns the bytes of the FP8 weights that Transformer Engine keeps between micro-batches."""
    if config.model.precision != "fp8":
        return 0.0
    layers = shape.num_layers // config.parallel.pipeline
    ends = (stage == 0) + (stage == config.parallel.pipeline - 1)
    plain = ends if config.model.fp8_first_last_bf16 else 0
    share = max(0, layers - plain) / layers
    return _FP8_COPIES[config.model.fp8_recipe] * share * found.matrices


def _activations(
    config: Config, shape: LlamaShape, world_size: int, stage: int, on_gpu: bool
) -> float:
    """Returns the bytes of all micro-batches under way.

    With full recomputation they include the one layer that runs again.
    """
    kernels = kernels_of(config, on_gpu=on_gpu)
    tokens = _micro_batch_tokens(config)
    micro_batches = config.num_microbatches(world_size)
    layers = layers_in_flight(config, shape.num_layers, micro_batches, stage)
    kept = layers * layer_bytes(shape, config, kernels)
    under_way = layers * config.parallel.pipeline / shape.num_layers
    kept += under_way * mask_bytes(config, kernels)
    if config.model.recompute == "full":
        kept += layer_bytes(shape, config, kernels, recompute="none")
    if stage == config.parallel.pipeline - 1:
        kept += head_bytes(shape, config, kernels)
    return tokens * kept


def _micro_batch_tokens(config: Config) -> float:
    """Returns the tokens of a micro-batch that a context-parallel rank holds."""
    rows = config.training.micro_batch_size
    return rows * config.data.sequence_length / config.parallel.context


def _working(config: Config, shape: LlamaShape, found: RankParameters, on_gpu: bool) -> float:
    """Returns the bytes of the tensors that the backward pass works on.

    These are the gradient of the logits (a bf16 copy beside fp32) or of a feed-forward block, and
    the gradient of one weight on its way into the buffer.
    """
    kernels, tensor = kernels_of(config, on_gpu=on_gpu), config.parallel.tensor
    tokens = _micro_batch_tokens(config)
    head = shape.padded_vocab_size if found.output or found.embedding else 0
    block = 4 * shape.ffn_hidden_size
    return kernels.value_bytes * (tokens * max(head, block) / tensor + found.largest)


def _weighting_activations(
    config: Config, weighting: WeightingShape | None, world_size: int, kernels: Kernels
) -> float:
    """Returns the bytes that the encoder keeps of a micro-batch and works on.

    It works on the gradient of a feed-forward block, the gradient of the largest weight and, if its
    products are in bf16, on copies of its matrices.
    """
    if weighting is None or weighting.encoder != "own" or not has_updates(config):
        return 0.0
    rows = config.training.global_batch_size // config.data_parallel_size(world_size)
    share = -(-rows // config.parallel.model_size)
    tokens = min(share, config.training.micro_batch_size) * config.data.sequence_length
    width, inner = weighting.hidden_size, weighting.ffn_hidden_size
    layers, value = weighting.num_layers, kernels.value_bytes
    kept = encoder_bytes(width, inner, weighting.num_attention_heads, layers, kernels)
    largest = _FP32 * width * max(weighting.vocab_size, 2 * inner)
    copies = value * layers * (4 * width + 3 * inner) * width if value < _FP32 else 0
    return tokens * (kept + value * 4 * inner) + largest + copies
