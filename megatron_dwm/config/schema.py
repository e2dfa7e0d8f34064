"""What a run is: frozen dataclasses, one for each section of a configuration file.

The order of the sections is the order in which a reader meets them in `examples/tiny.yaml`.
Every field is a key that users type (`--section.key value`); its docstring is its help text, so
it states units and what a special value means. `key` adds the rule beside it: the number's bound,
and what the key needs in order to have an effect. Values that follow from others are properties.
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
from megatron_dwm.config.key import SET, key
from megatron_dwm.config.schema_llm import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.config.schema_method import (
    BilevelConfig,
    PolicyConfig,
    ValidationConfig,
    WeightingConfig,
)

_PROFILED = {"profiling.tool": ("torch", "nvtx", "dlprof")}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs/run"
    """directory that receives everything the run writes"""
    seed: int = key(1234, SEED)
    """seed of parameters, data order and validation order"""
    resume: bool = False
    """go on from the newest whole checkpoint in run.dir (start afresh if there is none)"""
    allow_changed: list[str] = key([], only={"run.resume": (True,)})
    """keys that a resumed run may change against the rule, one by one by name (data.train also
    allows files with other content, and other domains); docs/robustness.md has the rule"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the LLM reads."""

    train: list[str | float] = field(default_factory=list)
    """prefixes of indexed files, or weights and prefixes in turn, as Megatron's --data-path"""
    tokenizer: str | None = None
    """what the data was tokenized with: a SentencePiece model or a tokenizer.json"""
    sequence_length: int = key(1024, TOKENS)
    """tokens in a training sample"""
    domain_key: str = "meta.redpajama_set_name"
    """metadata column that names a document's domain"""
    cache_dir: str | None = None
    """directory of the sample index cache; empty keeps it under run.dir"""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss while training; its rows are never trained on, nor is the weighting model."""

    path: str | None = None
    """JSON Lines file with a `text` and the domain key in every line; empty switches it off"""
    interval_steps: int = key(100, COUNT, only={"evaluation.path": SET})
    """steps between evaluations; the last step is always evaluated"""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is kept of the run."""

    tensorboard: bool = True
    """write TensorBoard event files"""
    metrics_interval_steps: int = key(1, COUNT)
    """steps whose lines of metrics.jsonl are written together; until then their weight statistics
    stay on the device, so that a step waits for one number fewer. Lines that are not written yet
    are lost when the run is killed, and written again when it is resumed"""
    weights_interval_steps: int = key(10, COUNT_OR_ZERO)
    """steps between records of every sample's weight in weights/*.parquet; 0 keeps none. Its column
    source says what sample_id counts in: samples that the LLM trains on (training), that updates
    draw for themselves (update), or target passages (target)"""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Where the time of a few steps goes (docs/planning.md)."""

    tool: Literal["none", "torch", "nvtx", "dlprof"] = "none"
    """torch: traces in run.dir/profile, on a CPU too; nvtx: ranges for Nsight Systems; dlprof:
    NVIDIA's DLProf, where it is installed"""
    first_step: int = key(10, COUNT, only=_PROFILED)
    """first step that is profiled, from 1, with the weighting updates before it"""
    last_step: int = key(12, COUNT, only=_PROFILED)
    """last step that is profiled"""
    ranks: list[int] = key([0], only=_PROFILED)
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
