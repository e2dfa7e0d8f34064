"""Add columns of cheap text statistics to the table of an indexed dataset."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError

if TYPE_CHECKING:
    from megatron_dwm.selection.copy import Advance

_EPILOG = """
Columns: length (characters); type_token_ratio (distinct words / words, in lower case); symbol_share
(characters that are neither white space, letters, digits nor _, / characters); compression_ratio
(bytes after zlib / bytes); mean_word_length (characters). PREFIX.meta.parquet is replaced at once;
its other columns keep their values. select_data.py qurating --column selects by them.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, default=argparse.SUPPRESS, metavar="PREFIX",
        help="dataset, without or with .idx (data/my_text_document)")  # fmt: skip
    add("--columns", nargs="+", required=True, default=argparse.SUPPRESS, metavar="NAME",
        help="columns to add")  # fmt: skip
    add("--tokenizer", required=True, default=argparse.SUPPRESS, metavar="M",
        help="the tokenizer that the data was made with, which decodes it")  # fmt: skip
    add("--replace", action="store_true", help="give columns that are there new values")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes that measure; the output is the same for any number")  # fmt: skip
    return parser.parse_args()


@contextmanager
def progress(total_bytes: int) -> Iterator[Advance]:
    """Show progress over bytes of the input."""
    from megatron_dwm.preprocess.progress import progress_over

    with progress_over(total_bytes) as bar:
        yield bar.advance


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: expected 1 or more")
    # Imported after the arguments are read, so that --help answers at once.
    from megatron_dwm.selection.score import ScoreSettings, score

    settings = ScoreSettings(
        prefix=arguments.input,
        columns=tuple(arguments.columns),
        tokenizer=arguments.tokenizer,
        num_workers=arguments.workers,
        replaces=arguments.replace,
    )
    values = score(settings, progress)
    for name, column in values.items():
        if len(column):
            print(f"{name}: mean {column.mean():.4g}, {column.min():.4g} to {column.max():.4g}")


if __name__ == "__main__":
    run_command(main)
