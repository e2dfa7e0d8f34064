"""Train a SentencePiece tokenizer with Llama 2's settings on JSON Lines corpora."""

from __future__ import annotations

import argparse

from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.readers import check_inputs, read_texts
from megatron_dwm.tokenizer import train_sentencepiece


def parse_arguments() -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__ + " BPE with byte fallback; ids: unk 0, bos 1, eos 2, bytes 3 to 258. "
        "The same input gives the same file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, default=argparse.SUPPRESS, metavar="FILE",
        help="JSON Lines files: .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .jsonl.xz")  # fmt: skip
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
    return parser.parse_args()


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    if arguments.vocab_size < 1:
        raise UserError(f"--vocab-size {arguments.vocab_size}: expected a positive number")
    check_inputs(arguments.input)
    texts = read_texts(arguments.input, arguments.json_key)
    train_sentencepiece(texts, vocab_size=arguments.vocab_size, output=arguments.output)
    print(f"{arguments.output}: {arguments.vocab_size} pieces")


if __name__ == "__main__":
    run_command(main)
