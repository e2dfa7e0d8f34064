"""The hypergradient of the validation loss, with three estimators behind one interface."""

from megatron_dwm.bilevel.ahead import AheadProbe, directions_ahead
from megatron_dwm.bilevel.frozen import frozen_alignments
from megatron_dwm.bilevel.hypergradient import ESTIMATORS, hypergradient
from megatron_dwm.bilevel.problem import Hypergradient, Problem, Target

__all__ = [
    "ESTIMATORS",
    "AheadProbe",
    "Hypergradient",
    "Problem",
    "Target",
    "directions_ahead",
    "frozen_alignments",
    "hypergradient",
]
