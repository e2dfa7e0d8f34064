"""The hypergradient: virtual step, tangent probe, and their composition."""

from megatron_dwm.bilevel.hypergradient import ESTIMATORS, Hypergradient, hypergradient

__all__ = ["ESTIMATORS", "Hypergradient", "hypergradient"]
