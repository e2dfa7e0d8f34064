"""Mix junk into a corpus: shuffled words, random words and random characters in equal parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dwm.config.command_line import OneLineParser, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__ + " Each kind is a domain of its own; all real documents are kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="corpus of JSON Lines, may be compressed",
    )
    add(
        "--output",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE.jsonl",
        help="corpus to write; must not exist",
    )
    add("--fraction", type=float, default=0.5, help="part of the output's text bytes that is junk")
    add("--seed", type=int, default=1234, help="seed of the junk and of the order of documents")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    from example_data.junk import add_junk

    summary = add_junk(
        arguments.input, Path(arguments.output), fraction=arguments.fraction, seed=arguments.seed
    )
    print(
        f"{arguments.output}: {summary.real_documents} real documents ({summary.real_bytes} bytes) "
        f"and {summary.junk_documents} of junk ({summary.junk_bytes} bytes)"
    )


if __name__ == "__main__":
    run_command(main)
