"""Tokenize corpora into Megatron's indexed files, with a table of every document's metadata."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.preprocess.megatron_flags import add_foreign_flags

if TYPE_CHECKING:
    from megatron_dwm.preprocess.settings import PreprocessSettings
    from megatron_dwm.preprocess.write.final_files import PreprocessSummary

_EPILOG = """
Writes P_KEY_document.bin and .idx, byte for byte what Megatron-LM's tool (d98e8a6) writes;
P_KEY_document.meta.parquet: a row a document (source file, record number, tokens, metadata); and
P.preprocess.json: inputs, options and counts. An empty document keeps its row (0 tokens) and its
boundary in the .idx, but has no sequence and no end of document. Until all is complete it is in
P.unfinished/; a run that was interrupted goes on from there with --resume. Of Megatron-LM's other
flags, --partitions, --keep-sequential-samples and --log-interval are accepted and not needed.
"""
_MIB = 1 << 20


def parse_arguments() -> argparse.Namespace:
    """Read the options, named as Megatron-LM names them where it has them."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=_EPILOG,
    )
    _add_files(parser)
    _add_records(parser)
    _add_running(parser)
    add_foreign_flags(parser)
    arguments = parser.parse_args()
    _check_special_tokens(arguments)
    return arguments


def asked_special_tokens(arguments: argparse.Namespace) -> bool | None:
    """True if special tokens are to be included; None if neither of the flags is given."""
    return vars(arguments).get("include_special_tokens")


def _check_special_tokens(arguments: argparse.Namespace) -> None:
    if (
        asked_special_tokens(arguments) is True
        and arguments.tokenizer_type != "HuggingFaceTokenizer"
    ):
        raise UserError(
            f"--tokenizer-hf-include-special-tokens: {arguments.tokenizer_type} has none around a "
            "text; only HuggingFaceTokenizer has"
        )


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Add the options for input, output and tokenizer."""

    def add(flag: str, metavar: str, text: str, nargs: str | None = None) -> None:
        parser.add_argument(
            flag, required=True, default=argparse.SUPPRESS, metavar=metavar, nargs=nargs, help=text
        )

    add(
        "--input",
        "FILE",
        "corpora in reading order: JSON Lines (.jsonl, plain or .gz, .zst, .bz2, .xz), .parquet, "
        ".arrow, a directory or a quoted pattern of such files (read in the order of their "
        "paths), or hf://DATASET[:split], streamed",
        nargs="+",
    )
    add("--output-prefix", "P", "beginning of the output files' names")
    add(
        "--tokenizer-type",
        "T",
        "SentencePieceTokenizer (also as GPTSentencePieceTokenizer), Llama2Tokenizer, "
        "HuggingFaceTokenizer or TikTokenizer",
    )
    add(
        "--tokenizer-model",
        "M",
        "SentencePiece .model; for HuggingFaceTokenizer a tokenizer.json or its directory; for "
        "TikTokenizer Llama 3's own tokenizer.model",
    )


def _add_records(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how records become documents."""
    add = parser.add_argument
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys that hold a text, or a list of texts (a document of several sequences); one "
        "dataset each",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    special_tokens = parser.add_mutually_exclusive_group()
    special_tokens.add_argument(
        "--tokenizer-hf-include-special-tokens",
        dest="include_special_tokens",
        action="store_true",
        default=argparse.SUPPRESS,
        help="with HuggingFaceTokenizer, every text gets the special tokens that its file asks for "
        "(Llama 3: a beginning); so it is by default, as in Megatron-LM today (0.16.1 did not)",
    )
    special_tokens.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        dest="include_special_tokens",
        action="store_false",
        default=argparse.SUPPRESS,
        help="without them, as Megatron-LM 0.16.1 by default",
    )
    add(
        "--pretokenized",
        action="store_true",
        help="the keys hold arrays of token ids of this tokenizer (QuRatedPajama: --json-keys "
        "input_ids)",
    )
    add(
        "--metadata-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys to keep as columns of the table; dots reach inside objects "
        "(meta.redpajama_set_name)",
    )
    add(
        "--on-bad-record",
        choices=["error", "skip"],
        default="error",
        help="broken JSON, missing or non-string text, invalid UTF-8, a truncated compressed "
        "file, an over-long line: stop, or leave the record out and list it in P.rejects.jsonl",
    )
    add(
        "--max-record-bytes",
        type=int,
        default=32 * _MIB,
        metavar="N",
        help="a longer line is a bad record, bytes",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    """Add the options of the work itself, which do not change the output."""
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads that tokenize; the output is the same for any number",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where an interrupted run of the same command stopped; a complete one is left "
        "as it is",
    )
    add(
        "--checkpoint-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds between checkpoints, which are made at the end of a chunk (8 MB of input)",
    )
    add(
        "--num-shards",
        type=int,
        default=1,
        metavar="N",
        help="split the files into N parts of about equal bytes, of which this run does one; "
        f"{name_of_command('merge')} joins them",
    )
    add(
        "--shard",
        type=int,
        default=0,
        metavar="I",
        help="the part to do, from 0; the output's names begin P-I-of-N",
    )


class StopRequest:
    """Notes Ctrl-C or SIGTERM (how a scheduler ends a job), so that the run makes a checkpoint."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def __call__(self) -> bool:
        """True once a signal has arrived."""
        return self.signal_number is not None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt  # asked twice: stop at once
        self.signal_number = number


def report(summary: PreprocessSummary) -> None:
    """Print the totals of the records."""
    rejected = sum(summary.rejected.values())
    if summary.was_complete:
        print(f"{summary.prefix}: complete already; nothing to do")
    for key, counts in summary.datasets.items():
        print(
            f"{summary.prefix}_{key}_document: {summary.records} records = {counts.documents} "
            f"documents + {counts.empty} empty + {rejected} rejected; {counts.tokens} tokens"
        )
    if rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.rejected.items())
        print(f"rejected: {reasons}; listed in {summary.rejects_path}")


def settings_of(arguments: argparse.Namespace) -> PreprocessSettings:
    """Build the settings that the options ask for."""
    from megatron_dwm.preprocess.settings import PreprocessSettings

    return PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        include_special_tokens=asked_special_tokens(arguments) is not False,
        num_workers=arguments.workers,
        metadata_keys=tuple(arguments.metadata_keys),
        on_bad_record=arguments.on_bad_record,
        pretokenized=arguments.pretokenized,
        max_record_bytes=arguments.max_record_bytes,
        shard=arguments.shard,
        num_shards=arguments.num_shards,
        resume=arguments.resume,
        checkpoint_interval_s=arguments.checkpoint_seconds,
    )


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    # Imported after the arguments are read, and inside `run_command`: --help answers at once, and
    # Ctrl-C meanwhile is one line.
    from megatron_dwm.preprocess.pipeline import Stopped, preprocess

    settings = settings_of(arguments)
    stop = StopRequest()
    try:
        report(preprocess(settings, stop))
    except Stopped:
        print(
            f"stopped; what is done is in {settings.prefix}.unfinished: the same command with "
            "--resume goes on",
            file=sys.stderr,
        )
        sys.exit(130 if stop.signal_number == signal.SIGINT else 1)


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
