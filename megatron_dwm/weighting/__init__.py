"""Who decides what a sample weighs: policies, and the learned one's model."""

from megatron_dwm.weighting.build import build_policy, weighting_shape
from megatron_dwm.weighting.dwm import DwmPolicy
from megatron_dwm.weighting.policy import LearningPolicy, Policy, UniformPolicy, WeightingUpdate

__all__ = [
    "DwmPolicy",
    "LearningPolicy",
    "Policy",
    "UniformPolicy",
    "WeightingUpdate",
    "build_policy",
    "weighting_shape",
]
