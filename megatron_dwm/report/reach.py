"""How much work a run needs to reach a loss: "FLOPs to the baseline's final loss"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from megatron_dwm.report.curves import key as number
from megatron_dwm.report.curves import points, within
from megatron_dwm.report.groups import only, with_same_seeds
from megatron_dwm.report.runs import Group, Run

MEAN = "mean of the domains"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Held-out losses of a group's runs, in their order, at one step."""

    step: int
    values: Sequence[float]


def newest_losses(group: Group, domain: str, beside: Group | None = None) -> Losses | None:
    """Returns the losses at the newest step that all runs of the group have evaluated.

    beside: the runs of this group must have evaluated the step, too. Runs that never evaluated the
    domain do not count. None if there is no such step.
    """
    found = [rows for run in group.runs if len(rows := _evaluations(run, domain))]
    others = [] if beside is None else [_evaluations(run, domain) for run in beside.runs]
    if not found or (beside is not None and not any(map(len, others))):
        return None
    common = set(found[0][:, 0])
    for rows in (*found, *others):
        common &= set(rows[:, 0]) if len(rows) else common
    if not common:
        return None
    step = max(common)
    return Losses(step=int(step), values=[float(rows[rows[:, 0] == step, 4][-1]) for rows in found])


def held_out(run: Run, domain: str, last_step: float = np.inf) -> np.ndarray:
    """Returns FLOPs and loss at each evaluation of a domain, or of `MEAN` [N, 2]."""
    rows = _evaluations(run, domain)
    return rows[~np.isnan(rows[:, 2]) & (rows[:, 0] <= last_step)][:, [2, 4]]


def evaluated(one: Group, other: Group, domain: str) -> tuple[Group, Group]:
    """Returns the runs of both groups that are compared: of a seed that both have evaluated."""
    first, second = (
        only(group, lambda run: len(_evaluations(run, domain)) > 0) for group in (one, other)
    )
    return with_same_seeds(first, second)


def common_steps(groups: Sequence[Group], domain: str) -> np.ndarray:
    """Returns the steps at which all runs of the groups have evaluated a domain, or `MEAN`."""
    steps = [_evaluations(run, domain)[:, 0] for group in groups for run in group.runs]
    return reduce(np.intersect1d, steps) if steps else np.empty(0)


def _evaluations(run: Run, domain: str) -> np.ndarray:
    value = number("loss") if domain == MEAN else within("domain_loss", domain)
    return points(run, "evaluation", value)


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
