"""Cuts every document of a corpus into short ones:   python examples/cut_documents.py --help

The new documents are consecutive parts of the old ones, of a random number of tokens each, and keep
their metadata. A window then holds several of them, good text beside junk.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.files.json_lines import numbered_lines
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer

_WORD = re.compile(r"\s*\S+")


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="JSON Lines, may be compressed")
    add("--output", required=True, metavar="FILE.jsonl", help="corpus to write; must not exist")
    add("--tokenizer", required=True, metavar="M.model", help="the tokenizer that counts tokens")
    add(
        "--least",
        type=int,
        default=30,
        help="fewest tokens of a document but the last part",
    )
    add("--most", type=int, default=200, help="most tokens, up to a word")
    add("--seed", type=int, default=1234, help="seed of the lengths")
    return parser.parse_args()


def parts(text: str, tokenizer: Tokenizer, lengths: Iterator[int]) -> Iterator[str]:
    """Yields consecutive parts of `text`, each of at least the next of `lengths` tokens."""
    part, tokens, wanted = [], 0, next(lengths)
    for word in _WORD.findall(text):
        part.append(word)
        tokens += len(tokenizer.encode(word))
        if tokens >= wanted:
            yield "".join(part)
            part, tokens, wanted = [], 0, next(lengths)
    if part:
        yield "".join(part)


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    if not 1 <= arguments.least <= arguments.most:
        raise UserError(f"--least {arguments.least}: expected 1 to --most, {arguments.most}")
    tokenizer = open_tokenizer(arguments.tokenizer)
    drawn = random.Random(arguments.seed)
    lengths = iter(lambda: drawn.randint(arguments.least, arguments.most), None)
    with Path(arguments.output).open("x", encoding="utf-8") as output:
        for _, raw in numbered_lines(Path(arguments.input)):
            record = json.loads(raw)
            for text in parts(record["text"], tokenizer, lengths):
                output.write(json.dumps({**record, "text": text}) + "\n")


if __name__ == "__main__":
    run_command(main)
