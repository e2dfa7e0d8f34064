"""Train the runs of a study whose outcomes are not known, and write what all of them show.

Without --part or --full: the parts that take under two hours on two cores. Runs are resumed where
they were stopped. The outcome of a finished run is one line of --results; such a run is not trained
again while its settings and its text are the same. The document is written from these lines.

Files that are in WORKDIR already are used: text.jsonl and heldout.jsonl (records with `text` and
`domain`), target.NAME.jsonl (`text`) and tokenizer.model compare the methods on your own text.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path

from examples.study.launch import to_train, train_all
from examples.study.results import Results
from examples.study.spec import FILE, Part, Run, Study, read_study
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command

_FULL, _GPU = "full", "h100-80gb"


def main() -> None:
    """Read the options, train and write."""
    arguments = _parser().parse_args()
    study = read_study(arguments.study)
    parts = study.chosen([_FULL] if arguments.full else arguments.part)
    if arguments.scale != 1.0:
        study = _scaled(study, arguments.scale)
    place = Workplace(folder=arguments.workdir.absolute(), study=study)
    if arguments.jobs < 1 or arguments.scale <= 0 or arguments.gpus < 0:
        raise UserError("--jobs, --scale and --gpus: expected numbers above 0")
    if place.folder.exists() and not place.folder.is_dir():
        raise UserError(f"WORKDIR {place.folder}: is no folder")
    place.prepare()
    study = study.for_domains(place.domains)
    parts, place = [study.parts[part.name] for part in parts], replace(place, study=study)
    results = Results.open(place, arguments.results or place.folder / "results.jsonl")
    if arguments.list:
        _print_runs(results, parts)
    runs = [run for part in parts for run in study.runs(part)]
    if arguments.full or arguments.list:
        _print_cost(results, to_train(results, runs), arguments.gpu)
    if arguments.list:
        return
    _check_gpus(arguments.gpus, full=arguments.full)
    try:
        train_all(results, runs, arguments.gpus or arguments.jobs, on_gpus=arguments.gpus > 0)
    finally:
        from examples.study.document import write_document

        print(write_document(results, arguments.output or place.folder / "study.md"))


def _check_gpus(asked: int, *, full: bool) -> None:
    """Raise UserError if runs would share a GPU by chance, or need one that is not there."""
    import torch

    there = torch.cuda.device_count()
    if there and not asked:
        raise UserError(
            f"this machine has {there} GPUs: give --gpus N, runs at a time, one on each"
        )
    if full and not there:
        raise UserError("--full: this machine has no GPU; with --list it prints the cost alone")
    if asked > there:
        raise UserError(f"--gpus {asked}: this machine has {there}")


def _print_cost(results: Results, runs: list[Run], gpu: str) -> None:
    # Megatron-Core prints this on import on every machine without these optional packages.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    from examples.study.cost import MFU, cost_table

    print(f"To train, at {MFU:.0%} of the GPU's peak:")
    print(cost_table(results.place, runs, gpu), flush=True)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, ", ".join(read_study().parts)
    add("workdir", type=Path, metavar="WORKDIR", help="folder of the study; made if missing")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--part",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"parts of the study (default: those that the file marks): {names}",
    )
    which.add_argument(
        "--full",
        action="store_true",
        help="the part for a machine with GPUs: 15M and 110M parameters; prints its cost first",
    )
    add("--study", type=Path, metavar="FILE.yaml", default=FILE, help="what is trained")
    add(
        "--results",
        type=Path,
        metavar="FILE.jsonl",
        help="outcomes that are known; others are added (default: WORKDIR/results.jsonl)",
    )
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    add("--gpus", type=int, default=0, metavar="N", help="runs at a time, each on a GPU of its own")
    add("--gpu", default=_GPU, metavar="NAME", help="GPU of the printed cost (%(default)s)")
    add(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="document to write, pictures beside it (default: WORKDIR/study.md)",
    )
    add("--list", action="store_true", help="print the runs, which are known, and the others' cost")
    add("--scale", type=float, default=1.0, help="factor of all steps, to try it (default: 1)")
    return parser


def _scaled(study: Study, factor: float) -> Study:
    sizes = {
        name: replace(size, steps=max(round(size.steps * factor), 1))
        for name, size in study.sizes.items()
    }
    return replace(study, sizes=sizes)


def _print_runs(results: Results, parts: list[Part]) -> None:
    for part in parts:
        for run in results.place.study.runs(part):
            state = "known" if results.of(run) is not None else "to train"
            print(f"{part.name}: {run.name}, {run.steps} steps: {state}")


if __name__ == "__main__":
    run_command(main)
