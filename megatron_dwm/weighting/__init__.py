"""Methods: what decides the weight of a sample; and the learned one's model."""

from megatron_dwm.weighting.method import (
    Alignments,
    BuildContext,
    Counters,
    Method,
    Needs,
    WeightingUpdate,
)
from megatron_dwm.weighting.registry import method_class

__all__ = [
    "Alignments",
    "BuildContext",
    "Counters",
    "Method",
    "Needs",
    "WeightingUpdate",
    "method_class",
]
