"""The hypergradient of the validation loss, with three estimators behind one interface."""

from megatron_dwm.bilevel.frozen import frozen_alignments
from megatron_dwm.bilevel.hypergradient import ESTIMATORS, hypergradient
from megatron_dwm.bilevel.problem import Hypergradient, Problem

__all__ = ["ESTIMATORS", "Hypergradient", "Problem", "frozen_alignments", "hypergradient"]
