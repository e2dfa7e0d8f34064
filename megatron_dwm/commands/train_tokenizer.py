"""Train a SentencePiece tokenizer with Llama 2's settings on corpora."""

from __future__ import annotations

import argparse
import signal
from typing import NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__ + " BPE with byte fallback; ids: unk 0, bos 1, eos 2, bytes 3 to 258. "
        "The same input and options give the same file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, default=argparse.SUPPRESS, metavar="FILE",
        help="JSON Lines (plain, .gz, .zst, .bz2, .xz), .parquet, .arrow, a directory or a quoted "
        "pattern of such files")  # fmt: skip
    add(
        "--vocab-size",
        type=int,
        required=True,
        default=argparse.SUPPRESS,
        metavar="V",
        help="pieces in the vocabulary",
    )
    add(
        "--output",
        required=True,
        default=argparse.SUPPRESS,
        metavar="M.model",
        help="model file to write; must not exist",
    )
    add("--json-key", default="text", metavar="KEY", help="key that holds the text")
    add(
        "--max-bytes",
        type=int,
        metavar="N",
        help="train on the first N bytes of text; 100 MB take some minutes and 1 to 2 GB of "
        "memory; empty takes all of it",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.99995,
        metavar="F",
        help="part of the text's characters that get a piece; the others become bytes",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    if arguments.vocab_size < 1:
        raise UserError(f"--vocab-size {arguments.vocab_size}: expected a positive number")
    if not 0 < arguments.character_coverage <= 1:
        raise UserError(
            f"--character-coverage {arguments.character_coverage}: expected more than 0, at most 1"
        )
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise UserError(f"--max-bytes {arguments.max_bytes}: expected a positive number")
    from megatron_dwm.preprocess.progress import progress_over
    from megatron_dwm.preprocess.read.inputs import find_inputs
    from megatron_dwm.preprocess.read.texts import first_bytes, read_texts
    from megatron_dwm.tokenizer import train_sentencepiece

    total_bytes = sum(entry.size_bytes for entry in find_inputs(arguments.input))
    # SentencePiece trains outside Python: Ctrl-C has to end the process without Python's help.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with progress_over(total_bytes) as progress:
        texts = read_texts(arguments.input, arguments.json_key, progress.advance)
        train_sentencepiece(
            first_bytes(texts, arguments.max_bytes),
            vocab_size=arguments.vocab_size,
            output=arguments.output,
            character_coverage=arguments.character_coverage,
            on_text_read=lambda: print("text read; learning pieces", flush=True),
        )
    print(f"{arguments.output}: {arguments.vocab_size} pieces")


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
