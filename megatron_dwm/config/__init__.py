"""The configuration of a run: frozen dataclasses, read from YAML and dotted overrides."""

from megatron_dwm.config.errors import LostPeer, RunError, UserError
from megatron_dwm.config.schema import (
    BilevelConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    PolicyConfig,
    ProfilingConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    WeightingConfig,
)

__all__ = [
    "BilevelConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LostPeer",
    "ModelConfig",
    "ParallelConfig",
    "PolicyConfig",
    "ProfilingConfig",
    "RunConfig",
    "RunError",
    "TrainingConfig",
    "UserError",
    "ValidationConfig",
    "WeightingConfig",
]
