"""Evaluate a Hugging Face model directory with lm-evaluation-harness.

--suite dwm runs ten public tasks (the papers' nine and LAMBADA), zero-shot and two-shot.
Their data sets come from the Hugging Face hub, from its cache, or from your files (--data-dir).
--suite local runs the task files in --tasks-dir on your data files and downloads nothing; names of
data files in a task file are relative to it. Prints a table with the harness's standard errors.

Without network: fill a cache where there is network (HF_HOME=/shared/hf, the same command with
--limit 1), then run here with the same HF_HOME and HF_HUB_OFFLINE=1. Or keep each task's splits as
JSON Lines in DIR/TASK/SPLIT.jsonl, such as DIR/sciq/test.jsonl, and use --data-dir DIR.
docs/evaluation.md shows both step by step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.evaluation.harness import run_harness
from megatron_dwm.evaluation.scores import (
    Score,
    comparable,
    format_table,
    read_written,
    write_scores,
)
from megatron_dwm.evaluation.suites import BundledTasks, LocalTasks, select_tasks

DEFAULT_SHOTS = {"dwm": [0, 2], "local": [0]}


def main() -> None:
    """Parse the arguments, evaluate, print and write."""
    arguments = _parser().parse_args()
    tasks = select_tasks(
        arguments.suite,
        tuple(arguments.tasks),
        tasks_dir=arguments.tasks_dir,
        data=arguments.data,
        data_dir=arguments.data_dir,
    )
    others = {path.stem: read_written(path, limit=arguments.limit) for path in arguments.compare}
    if len(others) < len(arguments.compare):
        raise UserError(
            "--compare: two files have the same name, which heads their columns; rename one"
        )
    with _output(arguments.output) as output:
        scores = _evaluate(arguments, tasks, others)
        if output is not None:
            about = {
                "model": str(arguments.model),
                "suite": arguments.suite,
                "limit": arguments.limit,
                "lm_eval": version("lm_eval"),
            }
            write_scores(output, scores, about)


def _evaluate(
    arguments: argparse.Namespace,
    tasks: BundledTasks | LocalTasks,
    others: Mapping[str, Sequence[Score]],
) -> Sequence[Score]:
    """Evaluate and print."""
    scores = run_harness(
        arguments.model,
        tasks,
        num_fewshot=arguments.num_fewshot or DEFAULT_SHOTS[arguments.suite],
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )
    compared = {name: comparable(scores, theirs, name) for name, theirs in others.items()}
    for other in compared.values():
        for note in other.notes:
            print(f"warning: --compare {note}", file=sys.stderr)
    print(format_table(scores, {name: other.scores for name, other in compared.items()}))
    return scores


@contextmanager
def _output(path: Path | None) -> Iterator[Path | None]:
    """Give the name to write to, which becomes `path` at the end, if nothing is there then."""
    if path is None:
        yield None
        return
    with new_outputs([path]) as partials:
        yield partials[path]


def _at_least(smallest: int) -> type[int]:
    def number(text: str) -> int:
        if int(text) < smallest:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {smallest}"
    return number  # type: ignore[return-value]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    _add_tasks(parser)
    _add_scoring(parser)
    return parser


def _add_tasks(parser: OneLineParser) -> None:
    add = parser.add_argument
    add("--suite", choices=("dwm", "local"), required=True, help="set of tasks")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="tasks to run (default: all of the suite)",
    )
    add(
        "--tasks-dir", type=Path, metavar="DIR", help="directory of the task files of --suite local"
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON Lines file to use instead of the local task's own (for one task only)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="read the data of --suite dwm from DIR/TASK/SPLIT.jsonl and download nothing",
    )


def _add_scoring(parser: OneLineParser) -> None:
    add = parser.add_argument
    add(
        "--num-fewshot",
        type=_at_least(0),
        nargs="+",
        metavar="N",
        help="few-shot examples before each question; several numbers run one after the other "
        "(default: 0 2 for --suite dwm, 0 for local)",
    )
    add(
        "--limit",
        type=_at_least(1),
        metavar="N",
        help="use the first N examples of each task (default: all)",
    )
    add(
        "--batch-size",
        type=_at_least(1),
        default=8,
        metavar="N",
        help="questions in one forward pass (default: 8)",
    )
    add(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="scores that --output wrote for other models, shown in columns of their own; tasks "
        "with other questions are left out",
    )
    add("--output", type=Path, metavar="FILE.json", help="also write the scores to this file")


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
