"""Report on a run: a page that opens in any browser, and every figure as PNG.

The page has everything in it and needs no network. It is written for a run that is still going,
too, and says what is missing. Runs of different seeds and otherwise equal training are one group:
their mean, and a band from the lowest to the highest.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.files.command_names import name_of_command

_PLOTTING = ("altair", "jinja2", "vl_convert")


def main() -> None:
    """Write the report and print its paths; with --watch, again whenever the run has gone on."""
    arguments = _parser().parse_args()
    _require_plotting()
    # These import the plotting library, which --help does without.
    from megatron_dwm.report.run_report import Request, write_report
    from megatron_dwm.report.watch import watch

    request = Request(
        run_dir=arguments.run_dir,
        compare=arguments.compare,
        target=arguments.target_domain,
        baseline=arguments.baseline,
        scores=arguments.scores,
    )
    if arguments.watch is not None:
        watch(request, arguments.watch)
        return
    for path in write_report(request):
        print(path)


def _require_plotting() -> None:
    try:
        for package in _PLOTTING:
            import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed; pip install 'megatron-dwm[report]'"
        ) from None


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__,
        epilog="Writes RUN_DIR/report/report.html and RUN_DIR/report/FIGURE.png, "
        "weight_by_domain.png and loss.png among them. docs/report.md explains the page.",
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run to report on")
    add(
        "--compare",
        metavar="RUN_DIR",
        type=Path,
        nargs="+",
        default=[],
        help="other runs, shown in the same plots (default: none)",
    )
    add(
        "--baseline",
        metavar="RUN",
        help="name of the run that others are compared with (default: the first of policy uniform)",
    )
    add(
        "--target-domain",
        metavar="NAME",
        help="held-out domain to show first, as the target (default: the one called target)",
    )
    add(
        "--scores",
        metavar="[RUN=]FILE.json",
        nargs="+",
        default=[],
        help=f"benchmark scores that {name_of_command('evaluate')} --output wrote; FILE is the "
        "run's name, or RUN= says it (files in RUN_DIR/evaluation/ are found without)",
    )
    add(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=10.0,
        help="write the page again when files of a run have changed, looking every SECONDS "
        "(default 10), until Ctrl-C; the page reloads itself, and no PNG is written",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 86400:
        raise ValueError
    return seconds


_seconds.__name__ = "number of seconds from 1 to 86400"


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
