"""What a run is: frozen dataclasses, one for each section of a configuration file.

The order of the sections is the order in which a reader meets them in `examples/tiny.yaml`.
Every field is a key that users type (`--section.key value`); its docstring is its help text, so
it states units and what a special value means. Values that follow from others are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16", "fp8"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Preset = Literal["tiny", "llama-370m", "llama-1.3b", "llama-2-7b", "llama-3-70b", "llama-3.1-405b"]
PolicyName = Literal["uniform", "dwm", "domain_mean", "validation_mixing"]
LEARNING_POLICIES = ("dwm", "domain_mean")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs/run"
    """directory that receives everything the run writes"""
    seed: int = 1234
    """seed of parameters, data order and validation order"""
    resume: bool = False
    """go on from the newest whole checkpoint in run.dir (start afresh if there is none)"""
    allow_changed: list[str] = field(default_factory=list)
    """keys that a resumed run may change against the rule, one by one by name (data.train also
    allows files with other content, and other domains); docs/robustness.md has the rule"""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is split over processes; what is left of the world is data parallel."""

    tensor: int = 1
    """tensor-parallel size (processes)"""
    pipeline: int = 1
    """pipeline-parallel size (processes)"""
    virtual_stages: int = 1
    """model chunks on every pipeline stage; above 1 Megatron's interleaved schedule runs"""
    sequence: bool = False
    """sequence parallelism inside the tensor-parallel group"""
    sharded_optimizer: bool = False
    """shard the optimiser's state over the data-parallel group (Megatron's DistributedOptimizer)"""
    timeout_s: int = 600
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
    fp8_recipe: Fp8Recipe = "tensorwise"
    """how FP8 scales are found: from the maxima of earlier steps (delayed), of the tensor itself
    (tensorwise), of blocks of 128 (blockwise, Hopper on) or of 32 values (mxfp8, Blackwell on)"""
    fp8_first_last_bf16: bool = False
    """keep the first and the last layer out of FP8 (not with fp8_recipe delayed)"""
    fp8_emulation: bool = False
    """FP8 numerics in the layers' matrix products without Transformer Engine, on a CPU too; slower
    than the products they stand for (fp8_recipe tensorwise)"""
    init_from: str | None = None
    """where the LLM's parameters come from: a Hugging Face directory (LlamaForCausalLM), or a
    checkpoint of an earlier run; the model then has that one's shape"""
    hidden_size: int | None = None
    """width of the residual stream"""
    num_layers: int | None = None
    """transformer layers"""
    num_attention_heads: int | None = None
    """query heads"""
    num_query_groups: int | None = None
    """key-value heads (grouped-query attention); equal to the query heads for plain attention"""
    ffn_hidden_size: int | None = None
    """inner width of the SwiGLU block"""
    vocab_size: int | None = None
    """pieces in the vocabulary; empty takes the tokenizer's"""
    tied_embeddings: bool | None = None
    """share the input embedding with the output layer"""
    rotary_base: float | None = None
    """base of the rotary position embedding"""
    norm_epsilon: float | None = None
    """epsilon of RMSNorm"""
    init_std: float | None = None
    """standard deviation of the normal initialisation"""
    recompute: Literal["none", "selective", "full"] = "none"
    """recompute activations in the backward pass: nothing, core attention, or whole layers"""

    @property
    def uses_fp8(self) -> bool:
        """Whether the layers' matrix products are asked for in FP8, emulated or not."""
        return self.precision == "fp8" or self.fp8_emulation


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the LLM reads."""

    train: list[str | float] = field(default_factory=list)
    """prefixes of indexed files, or weights and prefixes in turn, as Megatron's --data-path"""
    tokenizer: str | None = None
    """what the data was tokenized with: a SentencePiece model or a tokenizer.json"""
    sequence_length: int = 1024
    """tokens in a training sample"""
    domain_key: str = "meta.redpajama_set_name"
    """metadata column that names a document's domain"""
    cache_dir: str | None = None
    """directory of the sample index cache; empty keeps it under run.dir"""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The target: the text whose loss the weighting model lowers."""

    path: str | None = None
    """JSON Lines file with a `text` in every line (required by policy dwm)"""
    loss_on: Literal["all", "last_word"] = "all"
    """tokens that carry the validation loss"""
    batch_size: int | None = None
    """passages in one validation batch, none of them twice, so at most the file's rows (with
    loss_on all a row is data.sequence_length tokens); empty takes training.global_batch_size"""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss while training; its rows are never trained on, nor is the weighting model."""

    path: str | None = None
    """JSON Lines file with a `text` and the domain key in every line; empty switches it off"""
    interval_steps: int = 100
    """steps between evaluations; the last step is always evaluated"""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The LLM's optimiser and the loop."""

    steps: int = 1000
    """optimiser steps"""
    global_batch_size: int = 32
    """samples in one optimiser step, over all processes"""
    micro_batch_size: int = 32
    """samples in one forward pass of one process"""
    learning_rate: float = 3e-3
    """peak learning rate"""
    min_learning_rate_fraction: float = 0.1
    """fraction of the peak that the cosine reaches with the last step; 1 keeps the rate constant"""
    warmup_fraction: float = 0.05
    """fraction of the steps over which the learning rate rises linearly: of W steps, step k has k/W
    of the peak (Megatron-LM: (k - 1)/W, so that its first step changes nothing)"""
    weight_decay: float = 0.1
    """decoupled weight decay (norms and biases are exempt)"""
    clip_grad: float = 1.0
    """largest global gradient norm; 0 switches clipping off"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.95
    """decay of the second moment"""
    adam_epsilon: float = 1e-8
    """epsilon of Adam"""
    checkpoint_interval_steps: int = 500
    """steps between checkpoints; inside a weighting phase of several updates, updates between them
    too; the last step always writes one; 0 writes only that"""
    checkpoint_async: bool = False
    """write checkpoints beside training, which stands still only for a copy to host memory"""
    keep_last: int = 0
    """checkpoints that are kept, the newest, inside weighting phases or not; 0 keeps all"""
    keep_every: int = 0
    """checkpoints at multiples of this many steps are kept besides; 0 keeps none besides"""
    max_skipped_steps: int = 5
    """steps in a row that are skipped because their loss or gradient norm is not finite; one more
    stops the run"""
    spike_factor: float = 0.0
    """a loss above this many times its running mean takes the run back to the last checkpoint and
    passes over the batch; more than max_skipped_steps of them in a row stop the run; 0 switches it
    off"""
    log_interval_steps: int = 10
    """steps between lines on the terminal when it is not interactive"""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Who decides what a sample weighs."""

    name: PolicyName = "uniform"
    """uniform weighs all samples alike; dwm learns the weights; two baselines without a model:
    domain_mean weighs by a running mean of alignments for every domain, validation_mixing puts
    target passages into the training batch"""
    domain_decay: float = 0.9
    """part of a domain's running mean that an update keeps (domain_mean)"""
    domain_temperature: float = 0.5
    """divides the domains' means before the softmax (domain_mean); the means are of size 1, without
    weighting.standardize nats of validation loss, some thousandths"""
    mix_fraction: float = 0.1
    """part of every batch that is target passages, rounded to whole samples (validation_mixing)"""


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """The weighting model and when it learns (policies dwm and domain_mean)."""

    encoder: Literal["own", "llm"] = "own"
    """own: a small Llama of its own reads the tokens, and can be used with another LLM; llm: it
    reads what the LLM's forward pass makes of a sample, which costs next to nothing"""
    early_layer: int = 1
    """the LLM's layer, from 1, whose pooled output is read beside the final one (encoder llm)"""
    mode: Literal["staged", "online"] = "staged"
    """staged updates at stage boundaries with the LLM frozen; online updates every few steps"""
    stages: int = 5
    """stages of equal length (staged)"""
    updates_per_stage: int = 30
    """weighting updates at each stage boundary (staged)"""
    interval_steps: int = 10
    """LLM steps between two weighting updates (online)"""
    warmup_steps: int = 50
    """LLM steps with uniform weights before the first update (online); update_on training, whose
    first update comes inside the last of them, needs 2 or more"""
    update_on: Literal["fresh", "training"] = "fresh"
    """fresh: an update draws a batch of its own and costs three plain steps; training (online): it
    uses the batch, gradient and weights of the LLM step under way and costs two"""
    freeze_after: float = 1.0
    """fraction of training.steps after which the weighting model is no longer updated"""
    damp_by_noise: bool = False
    """shorten the updates by the measured reliability of the alignments"""
    load: str | None = None
    """directory of a weighting model (weighting/stage_K of a run) to start from; its sizes replace
    the four below (policy dwm); with encoder own, data.tokenizer must be the one it was trained
    with"""
    frozen: bool = False
    """apply the loaded weighting model without updating it"""
    hidden_size: int = 32
    """width of the weighting model"""
    num_layers: int = 1
    """transformer layers of its token encoder"""
    num_attention_heads: int = 4
    """heads of its encoder and of its attention across samples"""
    ffn_hidden_size: int = 64
    """inner width of its SwiGLU blocks"""
    group: Literal["micro_batch", "global"] = "micro_batch"
    """samples that share a softmax: those of a micro-batch, or of the global batch"""
    learning_rate: float = 1e-3
    """learning rate of AdamW on the weighting model"""
    weight_decay: float = 0.0
    """decoupled weight decay of the weighting model"""
    clip_grad: float = 1.0
    """largest gradient norm of the weighting model; 0 switches clipping off"""
    standardize: bool = True
    """standardise the alignments inside the weighting group before they drive an update; false
    takes them in nats of validation loss, whose size drifts during training"""
    min_effective_sample_size: float = 0.5
    """smallest effective sample size of a group, as a fraction of it, held by a temperature; above
    1 / the group's samples, which it never falls below; 0 switches it off"""
    warn_effective_sample_size: float = 0.1
    """warn once when the effective sample size of a batch's weights, as a fraction of the batch,
    falls below this"""
    uniform_floor: float = 0.0
    """part of every weight that stays uniform, 0 to below 1"""


@dataclass(frozen=True, kw_only=True)
class BilevelConfig:
    """How the hypergradient is computed (METHOD.md, section 2)."""

    estimator: Literal["tangent_probe", "finite_difference", "unroll"] = "tangent_probe"
    """tangent_probe works under every layout; the other two are slow cross-checks"""
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    """the virtual step: the step that training would take (adam), or plain gradient descent"""
    noise_interval_updates: int = 10
    """weighting updates between measurements of the alignments' signal-to-noise, each of which
    costs one more pass and needs two passages and three samples; 0 never measures"""
    min_signal_to_noise: float = 0.1
    """warn once when the measured signal-to-noise stays below this"""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is kept of the run."""

    tensorboard: bool = True
    """write TensorBoard event files"""
    weights_interval_steps: int = 10
    """steps between records of every sample's weight in weights/*.parquet; 0 keeps none. Its column
    source says what sample_id counts in: samples that the LLM trains on (training), that updates
    draw for themselves (update), or target passages (target)"""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Where the time of a few steps goes (docs/planning.md)."""

    tool: Literal["none", "torch", "nvtx", "dlprof"] = "none"
    """torch: traces in run.dir/profile, on a CPU too; nvtx: ranges for Nsight Systems; dlprof:
    NVIDIA's DLProf, where it is installed"""
    first_step: int = 10
    """first step that is profiled, from 1, with the weighting updates before it"""
    last_step: int = 12
    """last step that is profiled"""
    ranks: list[int] = field(default_factory=lambda: [0])
    """ranks that profile"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    @property
    def learns(self) -> bool:
        """Whether the policy is updated from hypergradients during the run."""
        return self.policy.name in LEARNING_POLICIES and not self.weighting.frozen

    @property
    def passages(self) -> int:
        """Passages asked for in a validation batch; the target may have fewer rows."""
        return self.validation.batch_size or self.training.global_batch_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the LLM among `world_size` processes."""
        return world_size // self.parallel.model_size

    def num_microbatches(self, world_size: int) -> int:
        """Micro-batches that one process runs in one optimiser step."""
        rows = self.training.micro_batch_size * self.data_parallel_size(world_size)
        return self.training.global_batch_size // rows
