"""Print what a run will need before it is started: memory, FLOPs, messages, time, and if it fits.

The configuration is that of pretrain, dotted options included; the files that it names need not
exist, except a model to start from (model.init_from, weighting.load). docs/planning.md says how the
numbers are computed, and with what they were compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import NoReturn

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import load

_GPU_NAMES = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-192gb")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__,
        usage="%(prog)s CONFIG.yaml --gpus N --gpu NAME [--mfu F] [--json] "
        "[--brief] [--section.key value ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="CONFIG.yaml and --section.key are those of `python -m megatron_dwm.pretrain "
        "--help`. GB are 10^9 bytes. Exits 0 whether or not the run fits.",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job")
    parser.add_argument("--gpu", choices=_GPU_NAMES, required=True, help="what they are")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="F",
        help="part of the peak FLOPs that the run is expected to reach",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print numbers as JSON")
    form.add_argument("--brief", action="store_true", help="print one line")
    return parser


def main() -> None:
    """Print the plan."""
    parser = _parser()
    options, rest = parser.parse_known_args()
    if options.gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, got {options.gpus}")
    if not 0.0 < options.mfu <= 1.0:
        raise UserError(f"--mfu: expected a fraction above 0, at most 1, got {options.mfu}")
    loaded = load(rest, parser.prog)
    config = loaded.config
    # Megatron-Core prints this on import on every machine without these optional packages.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    from megatron_dwm.planning import GPUS, make_plan
    from megatron_dwm.planning.table import plan_line, plan_text
    from megatron_dwm.weighting import method_class

    parts = method_class(config).parts(config)
    for line in warnings_of_effect(config, loaded.given, parts):
        print(f"warning: {line}", file=sys.stderr)
    plan = make_plan(config, GPUS[options.gpu], gpus=options.gpus, mfu=options.mfu)
    if options.brief:
        print(plan_line(plan))
    else:
        print(json.dumps(plan.to_json(), indent=2) if options.json else plan_text(plan))


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
