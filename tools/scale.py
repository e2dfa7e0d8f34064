"""Print how a step and a weighting update grow with the number of GPUs, by the planner's formulas.

Markdown tables, as in docs/scale.md. Every column is of one rank, the busiest. Seconds of a link
are its bytes, as a ring moves them, over the link's bandwidth, as if nothing overlapped and a
message cost nothing to start. The pipeline waits (p - 1) / (v m) of a pass of m micro-batches.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.load import load

if TYPE_CHECKING:  # heavy: --help and mistakes are answered before torch loads
    from megatron_dwm.planning import Plan
    from megatron_dwm.planning.traffic import Traffic

_GPU_NAMES = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-192gb")
_STEP = "GPUs|data|tokens (M)|GB|micro-batches|computes (s)|waits (%)|tensor (GB; s)"
_STEP += "|pipeline (GB; s)|data (GB; s)|messages"
_UPDATE = "GPUs|computes (s)|validation: samples a replica|waits in it (%)|tensor (GB; s)"
_UPDATE += "|pipeline (GB; s)|data (GB; s)|weighting (GB; s)|messages"
_PIPELINE, _CONTEXT = "|pipeline (GB; s)", "|context (GB; s)|pipeline (GB; s)"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__,
        usage="scale.py CONFIG.yaml --gpus N [N ...] --gpu NAME [--grow-batch] "
        "[--section.key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", required=True, metavar="N", help="GPUs of the job")
    add("--gpu", choices=_GPU_NAMES, required=True, help="what they are")
    add(
        "--grow-batch",
        action="store_true",
        help="grow the batch with the GPUs, from the first N's; default: the batch stays",
    )
    add("--mfu", type=float, default=0.4, metavar="F", help="part of the peak FLOPs (0.4)")
    add(
        "--node-gb-s",
        type=float,
        default=450.0,
        metavar="G",
        help="GB a second and GPU, one way, inside a node, for tensor parallelism (450: an H100's "
        "NVLink)",
    )
    add(
        "--network-gb-s",
        type=float,
        default=50.0,
        metavar="G",
        help="GB a second and GPU, one way, between nodes, for the rest (50: 400 Gbit/s a GPU)",
    )
    return parser


def main() -> None:
    """Print both tables."""
    options, rest = _parser().parse_known_args()
    if min(options.gpus) < 1:
        raise UserError(f"--gpus: expected 1 or more, got {min(options.gpus)}")
    _check_rates(options)
    config = load(rest, "scale.py").config
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    from megatron_dwm.planning import GPUS, make_plan

    plans = []
    for gpus in options.gpus:
        grown = _grown(config, gpus, options.gpus[0]) if options.grow_batch else config
        plans.append(make_plan(grown, GPUS[options.gpu], gpus=gpus, mfu=options.mfu))
    # Only a layout that has this link gets its column.
    links = _CONTEXT if config.parallel.context > 1 else _PIPELINE
    print("A step:\n")
    print(_markdown(_STEP.replace(_PIPELINE, links), [_step(plan, options) for plan in plans]))
    if plans[0].cost.num_updates:
        print("\nA weighting update:\n")
        print(
            _markdown(_UPDATE.replace(_PIPELINE, links), [_update(plan, options) for plan in plans])
        )


def _check_rates(options: argparse.Namespace) -> None:
    if not 0.0 < options.mfu <= 1.0:
        raise UserError(f"--mfu: expected a fraction above 0, at most 1, got {options.mfu}")
    for name in ("node_gb_s", "network_gb_s"):
        value = getattr(options, name)
        if not 0.0 < value < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected GB a second above 0, got {value}")


def _grown(config: Config, gpus: int, first: int) -> Config:
    """Returns the run with a batch that grows with the GPUs; its target's batch stays."""
    rows = config.training.global_batch_size * gpus // first
    return replace(
        config,
        training=replace(config.training, global_batch_size=rows),
        validation=replace(config.validation, batch_size=config.passages),
    )


def _step(plan: Plan, options: argparse.Namespace) -> list[str]:
    config, cost = plan.config, plan.cost
    passes = cost.llm + cost.recompute + cost.reading + cost.reference + cost.pool_passes
    weighting = (cost.weighing + cost.pool_scores) / plan.gpu.peak_flops(cost.weighting_precision)
    llm = passes / plan.gpu.peak_flops(config.model.precision)
    lines = {line.link: line for line in plan.traffic}
    return [
        f"{plan.gpus:,}",
        str(config.data_parallel_size(plan.gpus)),
        f"{plan.tokens_a_step / 1e6:.1f}",
        f"{plan.needed_bytes / 1e9:.1f}",
        str(config.num_microbatches(plan.gpus)),
        f"{(llm + weighting) / (plan.gpus * plan.mfu):.2f}",
        f"{100 * plan.bubble:.0f}",
        _link(lines["tensor"], options.node_gb_s, update=False),
        *(
            _link(lines[link], options.network_gb_s, update=False)
            for link in (*_context(config), "pipeline", "data")
        ),
        f"{sum(line.step_messages for line in plan.traffic):,.0f}",
    ]


def _update(plan: Plan, options: argparse.Namespace) -> list[str]:
    from megatron_dwm.planning.traffic import validation_pass

    config, cost = plan.config, plan.cost
    seconds = cost.updates / plan.gpu.peak_flops(config.model.precision)
    seconds += cost.learning / plan.gpu.peak_flops(cost.weighting_precision)
    # The cost is a mean over the run's steps.
    seconds *= config.training.steps / cost.num_updates / (plan.gpus * plan.mfu)
    validation, parallel = validation_pass(config, plan.gpus), config.parallel
    waits = (parallel.pipeline - 1) / (parallel.virtual_stages * validation.micro_batches)
    lines = {line.link: line for line in plan.traffic}
    return [
        f"{plan.gpus:,}",
        f"{seconds:.2f}",
        f"{config.passages / config.data_parallel_size(plan.gpus):.2g}",
        f"{100 * waits:.0f}",
        _link(lines["tensor"], options.node_gb_s, update=True),
        *(
            _link(lines[link], options.network_gb_s, update=True)
            for link in (*_context(config), "pipeline", "data", "weighting")
        ),
        f"{sum(line.update_messages for line in plan.traffic):,.0f}",
    ]


def _context(config: Config) -> tuple[str, ...]:
    return ("context",) if config.parallel.context > 1 else ()


def _link(line: Traffic, gb_s: float, *, update: bool) -> str:
    gigabytes = (line.update_wire if update else line.step_wire) / 1e9
    return f"{gigabytes:.1f}; {gigabytes / gb_s:.2f}"


def _markdown(columns: str, rows: list[list[str]]) -> str:
    head = columns.split("|")
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    run_command(main)
