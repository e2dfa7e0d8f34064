"""Make examples/corpus anew from the source files it was drawn from."""

from __future__ import annotations

import argparse
from pathlib import Path

from example_data.sample_corpus import make_sample_corpus

from megatron_dwm.config.command_line import OneLineParser, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="SlimPajama-like JSON Lines",
    )
    add(
        "--lambada",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="last-word passages, JSON Lines",
    )
    add("--output", default="examples/corpus", metavar="DIR", help="directory to fill")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    totals = make_sample_corpus(arguments.source, arguments.lambada, Path(arguments.output))
    for domain, (documents, size_bytes) in totals.items():
        print(f"{domain}: {documents} documents, {size_bytes} bytes of text to train on")


if __name__ == "__main__":
    run_command(main)
