"""The configuration of a run: frozen dataclasses, one for each section of a configuration file.

The sections have the order of `examples/tiny.yaml`. Every field is a key that users type
(`--section.key value`). Its docstring is its help text, so it states units and what a special value
means. `key` adds a rule: the number's bound, and what the key needs in order to have an effect.
Derived values are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dwm.config.bounds import (
    COUNT,
    COUNT_OR_ZERO,
    SEED,
    TOKENS,
)
from megatron_dwm.config.key import SET, Condition, key
from megatron_dwm.config.methods import learns_from_alignments
from megatron_dwm.config.schema_llm import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.config.schema_method import (
    BilevelConfig,
    PolicyConfig,
    ValidationConfig,
    WeightingConfig,
)

_TOKEN_WEIGHTS: Condition = {
    "weighting.unit": ("token",),
    "logging.weights_interval_steps": SET,
}
_EVALUATED = ({"evaluation.path": SET}, {"evaluation.sets": SET})
_WANDB = {"logging.wandb_project": SET}
_PROFILED = {"profiling.tool": ("torch", "nvtx", "dlprof")}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The directory of a run, its seed, and how it resumes."""

    dir: str = "runs/run"
    """directory for everything that the run writes"""
    seed: int = key(1234, SEED)
    """seed of parameters, data order and validation order"""
    resume: bool = False
    """continue from the newest complete checkpoint in run.dir; start from step 0 if there is
    none"""
    allow_changed: list[str] = key([], only={"run.resume": (True,)})
    """names of keys that a resumed run may change although they normally may not change; data.train
    also allows files with other content and other domains (docs/robustness.md)"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data."""

    train: list[str | float] = field(default_factory=list)
    """prefixes of indexed files, or weight prefix weight prefix ..., as Megatron's --data-path; a
    prefix that is named twice is one with both shares, so no sample is read twice in an epoch. In
    place of a prefix: a file of text (.jsonl, .jsonl.zst, .parquet and the like, with a `text` in
    each record), which is preprocessed once into data.cache_dir"""
    schedule: dict[int, list[float]] = field(default_factory=dict)
    """shares of the prefixes of data.train by step, instead of weights: 0=0.9,0.1 800=0.5,0.5 on
    the command line; in a file a step and a list of shares on each line. A step is the number of
    steps before it, so the first is 0. Shares need not have the sum 1; those of the last point stay
    (docs/blends.md)"""
    schedule_interpolation: Literal["constant", "linear"] = key(
        "constant", only={"data.schedule": SET}
    )
    """shares between two points of data.schedule: those of the earlier one (constant), or on the
    line between both (linear)"""
    tokenizer: str | None = None
    """the tokenizer that the data was made with: a SentencePiece model or a tokenizer.json"""
    sequence_length: int = key(1024, TOKENS)
    """tokens in a training sample"""
    mask_documents: bool | None = None
    """stop attention at the borders of the documents that a sample packs; empty means yes if
    weighting.unit is document, and no otherwise. Rotary positions only enter by their distance, so
    whether they begin anew at a border makes no difference"""
    border_loss: bool = True
    """count the label of a document's last token, which is the first token of the next document;
    without it samples have different numbers of counted tokens, and each sample's mean counts the
    same; for the mean over all tokens (Megatron-LM's --calculate-per-token-loss), set
    weighting.unit document"""
    domain_key: str = "meta.redpajama_set_name"
    """metadata column that names a document's domain"""
    cache_dir: str | None = None
    """directory of the sample index cache, and of texts that are preprocessed; empty keeps the
    first under run.dir, and the second in prepared_data beside it"""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss during training; neither the LLM nor the weighting model trains on its rows."""

    path: str | None = None
    """JSON Lines file with a `text` and the domain key in every line; empty switches it off"""
    sets: dict[str, str] = field(default_factory=dict)
    """more such files by name: --evaluation.sets NAME=FILE ...; a line of NAME counts as domain
    NAME, or NAME/DOMAIN if it has one"""
    interval_steps: int = key(100, COUNT, only=_EVALUATED)
    """steps between evaluations; the last step is always evaluated"""
    at_start: bool = key(False, only=_EVALUATED)
    """also evaluate before the first step"""

    @property
    def is_on(self) -> bool:
        """True if there is held-out text."""
        return self.path is not None or bool(self.sets)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What the run records."""

    tensorboard: bool = True
    """write TensorBoard event files"""
    wandb_project: str | None = None
    """project of Weights & Biases to log to, as well (Megatron's --wandb-project); empty: none"""
    wandb_exp_name: str | None = key(None, only=_WANDB)
    """name of the run there (Megatron's --wandb-exp-name); empty means that of run.dir"""
    wandb_entity: str | None = key(None, only=_WANDB)
    """team or user of the project (Megatron's --wandb-entity); empty means your default"""
    metrics_interval_steps: int = key(1, COUNT)
    """steps whose lines are written to metrics.jsonl together; until then their weight statistics
    stay on the device, which saves one wait in every step. If the run is killed, lines that are not
    yet written are lost; a resumed run writes them again"""
    weights_interval_steps: int = key(10, COUNT_OR_ZERO)
    """steps between records of every sample's weight in weights/*.parquet; 0 records none. The
    column source says what sample_id numbers: samples that the LLM trains on (training), samples
    that weighting updates draw (update), or passages of the target (target)"""
    weights_token_rows: int = key(4, COUNT_OR_ZERO, only=_TOKEN_WEIGHTS)
    """rows at the beginning of a recorded step's batch whose tokens are written to token_weights/,
    each with its weight, its loss and its excess loss (about 10 bytes a token); 0 writes of every
    row only how many tokens it kept"""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Profiling of a few steps (docs/planning.md)."""

    tool: Literal["none", "torch", "nvtx", "dlprof"] = "none"
    """torch: PyTorch traces in run.dir/profile, also on a CPU; nvtx: ranges for Nsight Systems;
    dlprof: ranges for NVIDIA's DLProf, which must be installed"""
    first_step: int = key(10, COUNT, only=_PROFILED)
    """first step that is profiled, counted from 1, with the weighting updates before it"""
    last_step: int = key(12, COUNT, only=_PROFILED)
    """last step that is profiled"""
    ranks: list[int] = key([0], only=_PROFILED)
    """ranks that profile"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run."""

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
    def masks_documents(self) -> bool:
        """True if attention stops at the borders of documents."""
        masks = self.data.mask_documents
        return self.weighting.unit == "document" if masks is None else masks

    @property
    def keeps_direction_in_bf16(self) -> bool:
        """True if directions ahead of steps are bf16 (`weighting.direction_precision`)."""
        asked = self.weighting.direction_precision
        return self.model.precision != "fp32" if asked is None else asked == "bf16"

    @property
    def update_on(self) -> Literal["fresh", "training", "ahead"]:
        """What an update learns from (`weighting.update_on`)."""
        asked = self.weighting.update_on
        ahead = self.weighting.mode == "online" and self.bilevel.estimator == "tangent_probe"
        return ("ahead" if ahead else "fresh") if asked is None else asked

    @property
    def passages(self) -> int:
        """Passages requested for a validation batch; the target may have fewer rows."""
        rows = self.training.global_batch_size
        quarter = self.update_on == "ahead" and learns_from_alignments(self.policy.name)
        return self.validation.batch_size or (-(-rows // 4) if quarter else rows)

    def gradient_ranks(self, world_size: int) -> int:
        """Returns the number of processes with the same parameters: data x context parallel."""
        return self.data_parallel_size(world_size) * self.parallel.context

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the number of replicas of the LLM in a job of `world_size` processes."""
        return world_size // self.parallel.model_size

    def num_microbatches(self, world_size: int) -> int:
        """Returns the number of micro-batches that one process runs in one optimizer step."""
        rows = self.training.micro_batch_size * self.data_parallel_size(world_size)
        return self.training.global_batch_size // rows
