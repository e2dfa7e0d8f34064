"""What a run needs and costs, by formulas from its configuration; nothing is started."""

from megatron_dwm.planning.hardware import GPUS, Gpu
from megatron_dwm.planning.plan import Plan, make_plan

__all__ = ["GPUS", "Gpu", "Plan", "make_plan"]
