"""Flags of Megatron-LM's tools/preprocess_data.py that this one does not have.

Job scripts carry them. What changes nothing here is accepted with a line; all others are refused by
name, with the way to go. The list is that of d98e8a6, and of 0.16.1 where it had others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.messages import warn


@dataclass(frozen=True, kw_only=True)
class ForeignFlag:
    """A flag of Megatron-LM's tool and what to tell a user whose command has it."""

    name: str
    nargs: int | str
    """number of values that follow it, as argparse spells it"""
    words: str


NOT_NEEDED = (
    ForeignFlag(
        name="--partitions",
        nargs=1,
        words="a file is read once, whatever its size; --num-shards splits work over machines",
    ),
    ForeignFlag(
        name="--keep-sequential-samples", nargs=0, words="documents always keep their order"
    ),
    ForeignFlag(name="--log-interval", nargs=1, words="progress is shown by itself"),
    ForeignFlag(
        name="--tokenizer-hf-use-fast", nargs=0, words="a tokenizer.json is always read so"
    ),
    ForeignFlag(
        name="--use-gigatoken", nargs=0, words="gigatoken encodes wherever its ids are the same"
    ),
)
_ONE_FILE = "name the vocabulary with --tokenizer-model (a .model, or a tokenizer.json)"
_IN_FILE = "the tokenizer's own file says it: put it there"
_TRAINING = "it shapes the model and not the data: model.vocab_size of the run's configuration"
_SPLIT = 'split the text beforehand and give the parts as a list ("text": ["one", "two"])'
_NLTK = f"it belongs to --split-sentences; {_SPLIT}"
_WORKERS = "choose --workers by hand; the output is the same for any number"
REFUSED = tuple(
    ForeignFlag(name=name, nargs=nargs, words=words)
    for name, nargs, words in (
        ("--split-sentences", 0, _SPLIT),
        ("--keep-newlines", 0, _NLTK),
        ("--lang", 1, _NLTK),
        ("--find-optimal-num-workers", 0, _WORKERS),
        ("--workers-to-check", "+", _WORKERS),
        ("--max-documents", 1, _WORKERS),
        ("--performance-dir", 1, _WORKERS),
        ("--vocab-file", 1, _ONE_FILE),
        ("--merge-file", 1, _ONE_FILE),
        ("--vocab-size", 1, _TRAINING),
        ("--vocab-extra-ids", 1, _TRAINING),
        ("--padded-vocab-size", 1, _TRAINING),
        ("--no-pad-vocab-size", 0, _TRAINING),
        ("--disable-pad-vocab-size", 0, _TRAINING),
        ("--make-vocab-size-divisible-by", 1, _TRAINING),
        ("--tokenizer-metadata", 1, _IN_FILE),
        ("--tokenizer-special-tokens", "+", _IN_FILE),
        ("--special-tokens", "+", _IN_FILE),
        ("--tokenizer-hf-no-use-fast", 0, "only tokenizer.json files are read; convert the other"),
        ("--legacy-tokenizer", 0, "leave it out: the ids are those of today's tokenizers"),
        ("--tokenizer-sentencepiece-legacy", 0, _IN_FILE),
        ("--no-tokenizer-sentencepiece-ignore-extra-whitespaces", 0, _IN_FILE),
        ("--disable-tokenizer-sentencepiece-ignore-extra-whitespaces", 0, _IN_FILE),
        ("--tiktoken-pattern", 1, "TikTokenizer reads Llama 3's file, which has one pattern"),
        ("--tiktoken-num-special-tokens", 1, "TikTokenizer reads Llama 3's file, which has 256"),
        ("--tiktoken-special-tokens", "+", "TikTokenizer reads Llama 3's file, which has its own"),
        ("--trust-remote-code", 0, "no code of a tokenizer is run; export it as tokenizer.json"),
        ("--chat-template", 1, "documents are text; apply the template beforehand"),
        ("--null-tokenizer-eod-id", 1, "for ids instead of text see --pretokenized"),
        ("--null-tokenizer-pad-id", 1, "for ids instead of text see --pretokenized"),
    )
)


class _NotNeeded(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Warn that the flag is not needed."""
        warn(f"{option_string} is not needed: {self.const}")


class _Refused(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Raise `UserError` with the way to go."""
        raise UserError(
            f"{option_string} is a flag of Megatron-LM's that is not here: {self.const}"
        )


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of these flags to `parser`, hidden from --help."""
    for flags, action in ((NOT_NEEDED, _NotNeeded), (REFUSED, _Refused)):
        for flag in flags:
            parser.add_argument(
                flag.name,
                action=action,
                nargs=flag.nargs,
                const=flag.words,
                default=argparse.SUPPRESS,
                dest=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
