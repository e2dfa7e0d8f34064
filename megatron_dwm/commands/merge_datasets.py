"""Join indexed datasets, and their tables of metadata, into one."""

from __future__ import annotations

import argparse
from typing import NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.files.command_names import name_of_command


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__ + " Documents keep their order: all of the first dataset, then all of "
        "the second, and so on. Files are copied at the disk's speed with a fixed buffer.",
        epilog=f"Shards of {name_of_command('preprocess')}: --input P-*_text_document.idx "
        "--output-prefix P_text_document",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="datasets to join, without or with .idx (P_text_document)",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P.bin, P.idx and, if the inputs have one, P.meta.parquet; none may exist",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    from megatron_dwm.preprocess.merge import merge_datasets, total_bytes
    from megatron_dwm.preprocess.progress import progress_over

    with progress_over(total_bytes(arguments.input)) as progress:
        summary = merge_datasets(arguments.input, arguments.output_prefix, progress.advance)
    print(
        f"{arguments.output_prefix}: {summary.documents} documents, {summary.tokens} tokens from "
        f"{len(arguments.input)} datasets"
    )
    if not summary.has_sidecar:
        print("none of them has a .meta.parquet, so neither has the result")


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
