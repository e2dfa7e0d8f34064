"""Train the runs of a study that are not finished, and write what they show.

Without --part: the parts that take under two hours on two cores. Runs are resumed where they were
stopped. The result is written after every call, from the runs that are finished by then.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from examples.study.launch import is_finished, train_all
from examples.study.spec import FILE, Part, Study, read_study
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command


def main() -> None:
    """Read the options, train and write."""
    arguments = _parser().parse_args()
    study = read_study(arguments.study)
    parts = study.chosen(arguments.part)
    if arguments.scale != 1.0:
        study = _scaled(study, arguments.scale)
    place = Workplace(folder=arguments.workdir.absolute(), study=study)
    if arguments.jobs < 1 or arguments.scale <= 0:
        raise UserError("--jobs and --scale: expected numbers above 0")
    if place.folder.exists() and not place.folder.is_dir():
        raise UserError(f"WORKDIR {place.folder}: is no folder")
    if arguments.list:
        _print_runs(place, parts)
        return
    place.prepare()
    train_all(place, (run for part in parts for run in study.runs(part)), arguments.jobs)
    from examples.study.document import write_document

    print(write_document(place, parts, arguments.output or place.folder / "study.md"))


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("workdir", type=Path, metavar="WORKDIR", help="folder of the study; made if missing")
    add(
        "--part",
        nargs="+",
        default=[],
        metavar="NAME",
        help="parts of the study, in the file's order (default: those that it marks)",
    )
    add(
        "--study",
        type=Path,
        metavar="FILE.yaml",
        default=FILE,
        help="what is trained (%(default)s)",
    )
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    add(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="document to write, pictures beside it (default: WORKDIR/study.md)",
    )
    add("--list", action="store_true", help="print the runs and whether they are finished")
    add("--scale", type=float, default=1.0, help="factor of all steps, to try it (default: 1)")
    return parser


def _scaled(study: Study, factor: float) -> Study:
    sizes = {
        name: replace(size, steps=max(round(size.steps * factor), 1))
        for name, size in study.sizes.items()
    }
    return replace(study, sizes=sizes)


def _print_runs(place: Workplace, parts: list[Part]) -> None:
    for part in parts:
        for run in place.study.runs(part):
            state = "finished" if is_finished(place.directory(run)) else "to do"
            print(f"{part.name}: {run.name}, {run.steps} steps: {state}")


if __name__ == "__main__":
    run_command(main)
