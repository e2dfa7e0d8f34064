"""Who decides what a sample weighs: policies, and the learned one's model."""

from megatron_dwm.weighting.build import build_policy
from megatron_dwm.weighting.dwm import DwmPolicy, WeightingUpdate
from megatron_dwm.weighting.policy import Policy, UniformPolicy

__all__ = ["DwmPolicy", "Policy", "UniformPolicy", "WeightingUpdate", "build_policy"]
