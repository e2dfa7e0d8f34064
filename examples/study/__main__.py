"""Train the runs of a study whose outcomes are not known, and write what all of them show.

Without --part or --full: the parts that take somewhat under two hours on two cores. Runs are
resumed where they were stopped. The outcome of a finished run is one line of --results; such a run
is not trained again while its settings and its text are the same. The document is written from
these lines.

Your own text: text.jsonl (records with `text` and `domain`) in WORKDIR is trained on in place of
the sample's, heldout.jsonl (the same) is measured on, the passages of target.novels.jsonl (`text`)
are the target of the default parts, and tokenizer.model is the tokenizer.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

from examples.study.document import ADVICE, TITLES, write_document
from examples.study.launch import to_train, train_all
from examples.study.results import Results
from examples.study.spec import Part, Run, Study
from examples.study.study_file import FILE, read_study
from examples.study.workplace import Workplace
from megatron_dwm.config import RunError, UserError
from megatron_dwm.config.command_line import OneLineParser, run_command

_FULL, _GPU, _MOST_SCALE = "full", "h100-80gb", 1000.0


def main() -> None:
    """Read the options, train and write."""
    # Megatron-Core prints this on import on every machine without these optional packages.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    arguments = _parser().parse_args()
    study = read_study(arguments.study)
    _check_numbers(arguments)
    names = [_FULL] if arguments.full else arguments.part
    with_cost = arguments.list or (_FULL in names and not arguments.no_training)
    _check_effects(arguments, with_cost=with_cost)
    asked = [part.name for part in study.chosen(names)]
    if not (arguments.list or arguments.no_training):
        _check_gpus(arguments.gpus, full=_FULL in asked)
    place = _prepared(arguments, study)
    parts = [place.study.parts[name] for name in asked]
    output = arguments.output or place.folder / "study.md"
    file = arguments.results or place.folder / "results.jsonl"
    _check_files(file, output)
    results = Results.open(place, file)
    runs = [run for part in parts for run in place.study.runs(part)]
    if arguments.list:
        _print_runs(results, parts)
    if with_cost:
        _print_cost(results, to_train(results, runs), arguments.gpu or _GPU)
    if arguments.list:
        return
    failed = 0
    if arguments.no_training and not results.commits:
        raise UserError(f"--no-training: {file} has no outcome of this study's runs")
    if not arguments.no_training:
        jobs = arguments.jobs or arguments.gpus or os.cpu_count() or 1
        failed = train_all(results, runs, jobs, gpus=arguments.gpus)
    print("\n".join(map(str, write_document(results, output))))
    if failed:
        raise RunError(f"{failed} runs failed: see above")


def _prepared(arguments: argparse.Namespace, study: Study) -> Workplace:
    """Returns the folder with its text; says what in it is the user's, and what that leaves out."""
    if not str(arguments.workdir).strip("."):
        raise UserError("WORKDIR: expected a folder's name")
    folder, factor = arguments.workdir.absolute(), arguments.scale
    study = study if factor == 1.0 else _scaled(study, factor)
    place = Workplace(folder=folder, study=study, scale=factor)
    try:
        own = place.prepare()
    except OSError as error:
        raise UserError(f"WORKDIR {folder}: {error.strerror}: {error.filename}") from None
    if own:
        print(f"your own: {', '.join(own)}; all other text is the sample's", flush=True)
    known = study.for_domains(place.text.domains)
    for name in sorted(study.methods.keys() - known.methods.keys()):
        domains = ", ".join(study.methods[name].domains)
        print(f"left out: {name}, which names the domains {domains} of the training text")
    return replace(place, study=known)


def _check_numbers(arguments: argparse.Namespace) -> None:
    if not (math.isfinite(arguments.scale) and 0 < arguments.scale <= _MOST_SCALE):
        raise UserError(
            f"--scale {arguments.scale}: expected a number above 0, at most {_MOST_SCALE}"
        )
    for name in ("jobs", "gpus"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: expected 1 or more")
    if (arguments.jobs or arguments.gpus or 1) < (arguments.gpus or 1):
        least = f"expected {arguments.gpus} or more, one for each of --gpus {arguments.gpus}"
        raise UserError(f"--jobs {arguments.jobs}: {least}")


def _check_effects(arguments: argparse.Namespace, *, with_cost: bool) -> None:
    """Raise UserError if an option would have no effect."""
    idle = {
        "list": ["jobs", "gpus", "output"],
        "no_training": ["part", "full", "jobs", "gpus", "gpu"],
    }
    for end, options in idle.items():
        for name in options:
            if getattr(arguments, end) and getattr(arguments, name):
                with_it = end.replace("_", "-")
                raise UserError(f"--{name}: has no effect with --{with_it}; leave it out")
    if arguments.gpu and not with_cost:
        raise UserError(
            "--gpu: names the GPU of the cost that --list and --full print; --gpus N trains on GPUs"
        )
    if arguments.gpu:
        from examples.study.cost import check_gpu

        check_gpu(arguments.gpu)


def _check_files(results: Path, output: Path) -> None:
    """Raise UserError if a file cannot be written, or is somebody else's."""
    for option, file in (("--results", results), ("--output", output)):
        if file.is_dir():
            raise UserError(f"{option} {file}: is a folder; name a file")
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f"{option} {file}: {file.parent} is no folder that can be written to")
    for file, title in ((output, TITLES[0]), (output.with_name(ADVICE), TITLES[1])):
        if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(
            title
        ):
            raise UserError(f"--output: {file} was not written by a study; name another folder")


def _check_gpus(asked: int | None, *, full: bool) -> None:
    """Raise UserError if runs would share a GPU by chance, or need one that is not there."""
    import torch

    there = torch.cuda.device_count()
    if there and not asked:
        raise UserError(
            f"this machine has {there} GPUs: give --gpus N, and --jobs M for M runs on them"
        )
    if full and not there:
        raise UserError("--full: this machine has no GPU; with --list it prints the cost alone")
    if asked is not None and asked > there:
        raise UserError(f"--gpus {asked}: this machine has {there}")


def _print_cost(results: Results, runs: list[Run], gpu: str) -> None:
    from examples.study.cost import MFU, cost_table

    print(f"To train, runs that others need included; hours at {MFU:.0%} of the GPU's peak:")
    print(cost_table(results, runs, gpu), flush=True)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="run.sh",
        usage="run.sh WORKDIR [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or a core)")
    add("--gpus", type=int, metavar="N", help="GPUs to train on; more jobs than GPUs share them")
    add("--gpu", metavar="NAME", help=f"GPU of the printed cost of --list and --full ({_GPU})")
    add(
        "--output",
        type=Path,
        metavar="FILE.md",
        help=f"document; pictures and {ADVICE} are written beside it (default: WORKDIR/study.md)",
    )
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--list", action="store_true", help="make the data, print the runs and their cost, and end"
    )
    ends.add_argument(
        "--no-training",
        action="store_true",
        help="write the document from the outcomes that are known, and end",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        metavar="F",
        help="factor of all steps, for a try; such runs are kept apart (default: 1)",
    )
    return parser


def _scaled(study: Study, factor: float) -> Study:
    sizes = {
        name: replace(size, steps=max(round(size.steps * factor), 1))
        for name, size in study.sizes.items()
    }
    return replace(study, sizes=sizes)


def _print_runs(results: Results, parts: list[Part]) -> None:
    for part in parts:
        runs = list(results.place.study.runs(part))
        again = {run.name for run in to_train(results, runs)}
        for run in runs:
            known = results.of(run) is not None
            state = "known" if known else "to train"
            if known and run.name in again:
                state = "known; trained again for a run that needs it"
            print(f"{part.name}: {run.name}, {run.steps} steps: {state}")


if __name__ == "__main__":
    run_command(main)
