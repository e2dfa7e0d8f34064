"""Evaluate a Hugging Face model directory with lm-evaluation-harness.

--suite local runs the task files in --tasks-dir on data files of yours and fetches nothing; data
file names in a task file are relative to it. --suite dwm runs ten public tasks (the nine of the
papers and LAMBADA), whose data sets have to be in the cache or reachable. Prints a table with the
harness's standard errors.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.evaluation.harness import run_harness
from megatron_dwm.evaluation.scores import format_table, write_scores
from megatron_dwm.evaluation.suites import select_tasks


def main() -> None:
    """Parse the arguments, evaluate, print and write."""
    arguments = _parser().parse_args()
    tasks = select_tasks(
        arguments.suite, tuple(arguments.tasks), arguments.tasks_dir, arguments.data
    )
    if arguments.output is not None:
        _require_writable(arguments.output)
    scores = run_harness(
        arguments.model,
        tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )
    print(format_table(scores))
    if arguments.output is not None:
        about = {
            "model": str(arguments.model),
            "suite": arguments.suite,
            "limit": arguments.limit,
            "lm_eval": version("lm_eval"),
        }
        write_scores(arguments.output, scores, about)


def _require_writable(output: Path) -> None:
    if output.exists():
        raise UserError(f"--output {output} exists; name another file or remove it")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no directory {output.parent}")


def _at_least(smallest: int) -> type[int]:
    def number(text: str) -> int:
        if int(text) < smallest:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {smallest}"
    return number  # type: ignore[return-value]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add("--suite", choices=("dwm", "local"), required=True, help="tasks to choose from")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    add("--tasks-dir", type=Path, metavar="DIR", help="task files of --suite local")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON Lines file in place of the local task's own (one task only)",
    )
    add(
        "--num-fewshot",
        type=_at_least(0),
        nargs="+",
        default=[0],
        metavar="N",
        help="solved examples before each question; several numbers run one after the other "
        "(default: 0)",
    )
    add("--limit", type=_at_least(1), metavar="N", help="first examples of a task (default: all)")
    add(
        "--batch-size",
        type=_at_least(1),
        default=8,
        metavar="N",
        help="questions in one forward pass (default: 8)",
    )
    add("--output", type=Path, metavar="FILE.json", help="also write the scores here")
    return parser


if __name__ == "__main__":
    run_command(main)
