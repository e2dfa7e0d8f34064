"""What FP8 does to the weighting's signal:   python examples/fp8_alignments.py CHECKPOINT

CHECKPOINT is a directory such as RUN/checkpoints/step_400. The samples' alignments with the
validation passages (all weights 1) are found twice at that very state, parameters and moments, and
on the same batches: in the run's own precision, and with the layers' products in emulated FP8.
Printed are the correlation of the two, of values and of ranks, and as a yardstick that between the
alignments with one half of the passages and those with the other half, in the run's precision:
noise that the weighting lives with anyway. One process, on a CPU too; nothing is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.config import Config, ParallelConfig, UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.load import load_config
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.training.checkpoint import load_checkpoint
from megatron_dwm.training.run import check
from megatron_dwm.training.session import Session, build_session


def main() -> None:
    """Print a line a batch and their means."""
    arguments = _parser().parse_args()
    config = _config_of(arguments.checkpoint)
    if not 1 <= arguments.batches <= config.training.steps:
        raise UserError(
            f"--batches: expected 1 to {config.training.steps}, the steps of the run, got "
            f"{arguments.batches}"
        )
    with bring_up(config.parallel, config.run.seed) as runtime:
        exact, quantised = (
            list(_hypergradients(config, runtime, arguments, fp8_emulation=fp8))
            for fp8 in (False, True)
        )
    _print_table(exact, quantised)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument(
        "--batches", metavar="N", type=int, default=8, help="global batches to average over (8)"
    )
    return parser


def _config_of(checkpoint: Path) -> Config:
    saved = checkpoint / "config.yaml"
    if not saved.is_file():
        raise UserError(
            f"{saved} is missing; expected a directory such as RUN/checkpoints/step_400"
        )
    config = load_config([str(saved)])
    if not config.learns:
        raise UserError(f"{saved}: policy.name {config.policy.name} has no alignments")
    return replace(config, parallel=ParallelConfig())


def _hypergradients(
    config: Config, runtime: Runtime, arguments: argparse.Namespace, *, fp8_emulation: bool
) -> Iterator[Hypergradient]:
    """One a batch, from the checkpoint's step on; passages in halves."""
    config = replace(config, model=replace(config.model, fp8_emulation=fp8_emulation))
    session = build_session(config, runtime, *check(config))
    load_checkpoint(session, arguments.checkpoint)
    first = min(session.state.step, config.training.steps - arguments.batches)
    for number in range(first, first + arguments.batches):
        yield ESTIMATORS["tangent_probe"](_problem(session, number), halves=True)


def _problem(session: Session, number: int) -> Problem:
    train = session.training_batch(number)
    return Problem(
        llm=session.llm,
        optimizer=session.optimizer,
        train_batch=train,
        weights_n=torch.ones(train.size, device=session.runtime.device),
        val_batch=session.validation_batch(number),
        micro_batch_size=session.config.training.micro_batch_size,
        inner=session.config.bilevel.inner_optimizer,
    )


def _print_table(exact: list[Hypergradient], quantised: list[Hypergradient]) -> None:
    print("FP8 against the run's precision        | one half of the passages against the other")
    print("correlation  of ranks  relative error  | correlation")
    rows = []
    for one, other in zip(exact, quantised, strict=True):
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
    print(_line(torch.tensor(rows).mean(dim=0).tolist()))


def _line(row: list[float]) -> str:
    return f"{row[0]:11.4f}{row[1]:10.4f}{row[2]:16.4f}  | {row[3]:11.4f}"


def _correlation(a_n: Tensor, b_n: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a_n, b_n]).double())[0, 1])


def _ranks(values_n: Tensor) -> Tensor:
    return values_n.argsort().argsort()


if __name__ == "__main__":
    run_command(main)
