"""The effect of FP8 on alignments:   python examples/fp8_alignments.py RUN_OR_CHECKPOINT

RUN_OR_CHECKPOINT is a run's directory, whose newest whole checkpoint is taken, or a directory such
as RUN/checkpoints/step_00000400. The samples' alignments with the validation passages (all weights
1) are computed twice from that state, parameters and moments, on the same batches: in the run's
unquantized precision (bf16 for a run in FP8, else that of the run), and with the layers' products
in emulated FP8, one scale a tensor. The output is the correlation of the two, of values and of
ranks. For comparison it has the correlation between the alignments with one half of the passages
and those with the other half, unquantized: noise that every update has. The script needs one
process, with or without a GPU. It ignores the run's parallel layout, profiling and logging, and
does not change the run.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.config import (
    Config,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    ProfilingConfig,
    UserError,
)
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.load import load_config

if TYPE_CHECKING:  # heavy: --help and mistakes are answered before torch and Megatron-Core load
    from torch import Tensor

    from megatron_dwm.bilevel import Hypergradient, Problem
    from megatron_dwm.run.job import Job
    from megatron_dwm.runtime import Runtime


def main() -> None:
    """Print a line for every batch, and their means."""
    arguments = _parser().parse_args()
    _quiet_upstream()
    from megatron_dwm.checkpoint.manifest import named_checkpoint
    from megatron_dwm.runtime import bring_up, world_size_from_environment

    if world_size_from_environment() > 1:
        raise UserError("this is for one process; start it with python, without torchrun")
    checkpoint = named_checkpoint(arguments.checkpoint)
    of_run = _config_of(checkpoint)
    unquantized = _unquantized(of_run, arguments.batches)
    pair = (unquantized, _in_fp8(unquantized, of_run))
    with bring_up(unquantized.parallel, unquantized.run.seed) as runtime:
        exact, quantized = (
            list(_hypergradients(config, runtime, checkpoint, arguments.batches)) for config in pair
        )
    _print_table(unquantized.model.precision, exact, quantized)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=Path)
    parser.add_argument(
        "--batches", metavar="N", type=int, default=8, help="global batches to average over (8)"
    )
    return parser


def _quiet_upstream() -> None:
    """Silence Megatron-Core's messages on import, and torch's about renamed functions."""
    warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_dwm\.runtime\.cpu")


def _config_of(checkpoint: Path) -> Config:
    """Returns the run's configuration. Raises UserError unless it is a run that learns."""
    for name in ("config.yaml", "manifest.json"):
        if not (checkpoint / name).is_file():
            raise UserError(
                f"{checkpoint / name} is missing; expected a run, or a checkpoint that it saved"
            )
    from megatron_dwm.weighting import learns

    config = load_config([str(checkpoint / "config.yaml")])
    if not learns(config):
        raise UserError(f"{checkpoint}: policy.name {config.policy.name} has no alignments")
    return config


def _unquantized(config: Config, batches: int) -> Config:
    """Returns the configuration without FP8, in one process, and without parts only a run needs."""
    if not 1 <= batches <= config.training.steps:
        raise UserError(
            f"--batches: expected 1 to {config.training.steps}, the steps of the run, got {batches}"
        )
    if config.passages < 2:
        raise UserError(
            "the run reads one validation passage at a time, which has no halves; take a run with "
            "two or more"
        )
    model = replace(
        config.model,
        precision="fp32" if config.model.precision == "fp32" else "bf16",
        fp8_recipe="tensorwise",
        fp8_emulation=False,
        fp8_first_last_bf16=False,
    )
    return replace(
        config,
        model=model,
        bilevel=replace(config.bilevel, estimator="tangent_probe"),
        parallel=ParallelConfig(),
        evaluation=EvaluationConfig(),
        logging=LoggingConfig(),
        profiling=ProfilingConfig(),
    )


def _in_fp8(unquantized: Config, of_run: Config) -> Config:
    """Returns the same in emulated FP8, in the layers that the run has in FP8."""
    ends = of_run.model.fp8_first_last_bf16
    model = replace(unquantized.model, fp8_emulation=True, fp8_first_last_bf16=ends)
    return replace(unquantized, model=model)


def _hypergradients(
    config: Config, runtime: Runtime, checkpoint: Path, batches: int
) -> Iterator[Hypergradient]:
    """Yields one for every batch from the checkpoint's step on, with its passages in halves."""
    from megatron_dwm.bilevel import ESTIMATORS
    from megatron_dwm.checkpoint.parts import Parts
    from megatron_dwm.run.checks import check
    from megatron_dwm.run.job import build_job, load_job

    job = build_job(config, runtime, check(config))
    if job.feed.passages < 2:
        raise UserError(f"{config.validation.path} has one row, and one row has no halves")
    parts = Parts(
        llm=job.learner.llm,
        optimizer=job.learner.optimizer,
        method_name=config.policy.name,
        method=job.method,
        state=job.state,
    )
    load_job(job, parts, checkpoint)
    first = min(job.state.step, config.training.steps - batches)
    for number in range(first, first + batches):
        problem = _problem(job, number, config)
        yield ESTIMATORS["tangent_probe"](problem, halves=True)


def _problem(job: Job, number: int, config: Config) -> Problem:
    import torch

    from megatron_dwm.bilevel import Problem

    train = job.feed.training(number)
    return Problem(
        llm=job.learner.llm,
        optimizer=job.learner.optimizer,
        train_batch=train,
        weights_n=torch.ones(train.size, device=job.learner.runtime.device),
        val_batch=job.feed.validation(number, halves=True),
        micro_batch_size=job.learner.micro_batch_size,
        inner=config.bilevel.inner_optimizer,
    )


def _print_table(
    precision: str, exact: list[Hypergradient], quantized: list[Hypergradient]
) -> None:
    title = f"{precision} against emulated FP8"
    print(f"{title:39}| {precision}: one half of the passages against the other")
    print("correlation  of ranks  relative error  | correlation")
    rows = []
    for one, other in zip(exact, quantized, strict=True):
        assert one.halves_2n is not None
        a_n, b_n = one.alignment_n, other.alignment_n
        rows.append(
            [
                _correlation(a_n, b_n),
                _correlation(_ranks(a_n), _ranks(b_n)),
                float((a_n - b_n).norm() / a_n.norm()),
                _correlation(*one.halves_2n),
            ]
        )
        print(_line(rows[-1]))
    print("mean")
    print(_line([sum(column) / len(rows) for column in zip(*rows, strict=True)]))


def _line(row: list[float]) -> str:
    return f"{row[0]:11.4f}{row[1]:10.4f}{row[2]:16.4f}  | {row[3]:11.4f}"


def _correlation(a_n: Tensor, b_n: Tensor) -> float:
    import torch

    return float(torch.corrcoef(torch.stack([a_n, b_n]).double())[0, 1])


def _ranks(values_n: Tensor) -> Tensor:
    return values_n.argsort().argsort()


if __name__ == "__main__":
    run_command(main)
