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
from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.preprocess.read.inputs import find_inputs
from megatron_dwm.preprocess.read.parsing import parse_record, text_of
from megatron_dwm.preprocess.read.texts import read_lines_of
from megatron_dwm.preprocess.records import BadRecord
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer

_WORD = re.compile(r"\s*\S+")


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__.partition(":")[0] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    for name, metavar, meaning in (
        ("--input", "FILE", "corpus of JSON Lines, may be compressed"),
        ("--output", "FILE.jsonl", "corpus to write; must not exist"),
        ("--tokenizer", "M.model", "the tokenizer that counts tokens"),
    ):
        add(name, required=True, default=argparse.SUPPRESS, metavar=metavar, help=meaning)
    add("--least", type=int, default=30, help="fewest tokens of a part, but the last of a document")
    add("--most", type=int, default=200, help="most tokens, up to the end of a word")
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
    if not arguments.output.endswith(".jsonl"):
        raise UserError(f"{arguments.output}: the output is JSON Lines; end its name with .jsonl")
    find_inputs([arguments.input])
    tokenizer = open_tokenizer(arguments.tokenizer)
    drawn = random.Random(arguments.seed)
    lengths = iter(lambda: drawn.randint(arguments.least, arguments.most), None)
    output = Path(arguments.output)
    with new_outputs([output]) as partials, partials[output].open("w", encoding="utf-8") as lines:
        for record, whole in _records(arguments.input):
            for text in parts(whole, tokenizer, lengths):
                lines.write(json.dumps({**record, "text": text}) + "\n")


def _records(source: str) -> Iterator[tuple[dict[str, object], str]]:
    """Yields the records of a corpus and their texts."""
    for where, line in read_lines_of([source]):
        try:
            record = parse_record(line)
            text = text_of(record, "text")
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None
        yield record, text


if __name__ == "__main__":
    run_command(main)
