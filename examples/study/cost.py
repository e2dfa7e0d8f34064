"""What the runs of a study cost, by the planner, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.study.results import Results
from examples.study.spec import Run
from examples.study.tables import NONE, table
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.config.load import load
from megatron_dwm.planning import GPUS, Plan, make_plan

_MANY_PASSES = 10
_MEMORIZED = (
    "\nwarning: up to {:.0f} passes over the corpus, which will be memorized; put text of your own "
    "into WORKDIR (--help)\n"
)
MFU = 0.4
"""part of the peak FLOPs that a GPU is expected to reach"""


def check_gpu(name: str) -> None:
    """Raise UserError for a GPU that the planner does not know."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: expected one of {', '.join(GPUS)}")


def cost_table(results: Results, runs: Sequence[Run], gpu: str) -> str:
    """Returns what runs cost by size and method: known seconds, passes, FLOPs, hours on a GPU.

    gpu: a name of `GPUS`.

    Makes the data of one run of each. Raises UserError for a run that does not fit on the GPU.
    """
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.size.name, run.method.name), []).append(run)
    place, rows, hours, most = results.place, [], 0.0, 0.0
    for (size, method), group in alike.items():
        steps, plan = group[0].steps, _plan(place, group[0], gpu)
        row = [size, method, str(len(group)), str(steps), results.seconds(size, method)]
        if plan is None:
            rows.append([*row, NONE, NONE, NONE])
            continue
        if not plan.fits:
            raise UserError(f"{group[0].name} does not fit on one {gpu}: name a larger --gpu")
        each = plan.step_s * steps / 3600
        hours += each * len(group)
        passes = plan.tokens_a_step * steps / place.data(group[0]).tokens()
        most = max(most, passes)
        rows.append([*row, f"{passes:.1f}", f"{plan.cost.total * steps:.3g}", f"{each:.3g}"])
    rows.append(["all but -", "", str(len(runs)), "", "", "", "", f"{hours:.3g}"])
    heads = ["size", "method", "runs", "steps", "seconds of known ones", "passes", "FLOPs of one"]
    found = table([*heads, f"hours of one on an {gpu}"], rows)
    return found + _MEMORIZED.format(most) if most > _MANY_PASSES else found


def _plan(place: Workplace, run: Run, gpu: str) -> Plan | None:
    """Returns the plan of a run; None if it begins from files that are not there yet."""
    if run.needs:
        return None
    command = place.command(run, Path("data"))
    config = load(command[command.index("megatron_dwm.pretrain") + 1 :], "study").config
    return make_plan(config, GPUS[gpu], gpus=1, mfu=MFU)
