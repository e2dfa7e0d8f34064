"""How much work a run needs to reach a loss: "FLOPs to the baseline's final loss"."""

from __future__ import annotations

import numpy as np

from megatron_dwm.report.curves import key as number
from megatron_dwm.report.curves import points, within
from megatron_dwm.report.runs import Run

MEAN = "mean of the domains"


def held_out(run: Run, domain: str) -> np.ndarray:
    """Returns FLOPs and loss at each evaluation of a domain, or of `MEAN` [N, 2]."""
    value = number("loss") if domain == MEAN else within("domain_loss", domain)
    rows = points(run, "evaluation", value)
    return rows[~np.isnan(rows[:, 2])][:, [2, 4]]


def work_to_reach(flops_and_loss: np.ndarray, loss: float) -> float | None:
    """Returns the FLOPs at which the loss was first at or below `loss`; None if it never was.

    Linear between two evaluations. If the first one is there already, its FLOPs: an upper bound.
    """
    reached = np.flatnonzero(flops_and_loss[:, 1] <= loss)
    if not len(reached):
        return None
    last = int(reached[0])
    if last == 0:
        return float(flops_and_loss[0, 0])
    (before, above), (after, below) = flops_and_loss[last - 1], flops_and_loss[last]
    return float(before + (after - before) * (above - loss) / (above - below))
