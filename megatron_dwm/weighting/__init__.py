"""Methods that decide the weights of samples, and the weighting model."""

from megatron_dwm.weighting.method import (
    Alignments,
    BuildContext,
    Counters,
    Method,
    Needs,
    WeightingUpdate,
)
from megatron_dwm.weighting.pool import ChoosesFromPool, PoolAlignments
from megatron_dwm.weighting.registry import check_method, learns, method_class, with_options

__all__ = [
    "Alignments",
    "BuildContext",
    "ChoosesFromPool",
    "PoolAlignments",
    "Counters",
    "Method",
    "Needs",
    "WeightingUpdate",
    "check_method",
    "learns",
    "method_class",
    "with_options",
]
