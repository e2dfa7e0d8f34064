"""Plot a run: mean weight by domain, and losses beside those of other runs."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.report.run_report import write_report


def main() -> None:
    """Write RUN_DIR/report/weight_by_domain.png and loss.png and print their paths."""
    parser = OneLineParser(
        description=__doc__,
        epilog="Writes RUN_DIR/report/weight_by_domain.png and RUN_DIR/report/loss.png. "
        "Steps are optimizer steps, losses are in nats a token, and a weight of 1 is uniform.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="directory of the run to plot"
    )
    parser.add_argument(
        "--compare",
        metavar="RUN_DIR",
        type=Path,
        nargs="+",
        default=[],
        help="other runs, whose losses are plotted too (default: none)",
    )
    parser.add_argument(
        "--target-domain",
        metavar="NAME",
        help="held-out domain to show first, as the target (default: the one called target)",
    )
    arguments = parser.parse_args()
    for path in write_report(arguments.run_dir, arguments.compare, arguments.target_domain):
        print(path)


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
