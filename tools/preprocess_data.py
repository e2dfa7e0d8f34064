"""Tokenize corpora into Megatron's indexed files, with a table of every document's metadata."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.pipeline import PreprocessSettings, PreprocessSummary, preprocess
from megatron_dwm.tokenizer import TOKENIZER_KINDS


def parse_arguments() -> argparse.Namespace:
    """Options, named as Megatron-LM names them where it has them."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Writes P_KEY_document.bin and .idx, byte for byte what Megatron-LM's tool writes, "
        "and P_KEY_document.meta.parquet: a row a document (source file, record number, tokens, "
        "metadata). An empty document keeps its row (0 tokens) and its boundary in the .idx, but "
        "has no sequence and no end of document.",
    )
    _add_files(parser)
    _add_behaviour(parser)
    return parser.parse_args()


def _add_files(parser: argparse.ArgumentParser) -> None:
    """What is read and written, and with which tokenizer."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="JSON Lines files in reading order: .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, "
        ".jsonl.xz",
    )
    add(
        "--output-prefix",
        required=True,
        default=argparse.SUPPRESS,
        metavar="P",
        help="beginning of the output files' names",
    )
    add(
        "--tokenizer-type",
        required=True,
        default=argparse.SUPPRESS,
        metavar="T",
        help=f"one of {', '.join(TOKENIZER_KINDS)}",
    )
    add(
        "--tokenizer-model",
        required=True,
        default=argparse.SUPPRESS,
        metavar="M",
        help="SentencePiece model file",
    )


def _add_behaviour(parser: argparse.ArgumentParser) -> None:
    """How records become documents."""
    add = parser.add_argument
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys that hold text; one dataset each",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenize; the output is the same for any number",
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
        help="broken JSON, missing or non-string text, invalid UTF-8: stop, or leave the record "
        "out and list it in P.rejects.jsonl",
    )


def report(summary: PreprocessSummary, prefix: str) -> None:
    """Print what became of the records."""
    for key, counts in summary.datasets.items():
        print(
            f"{prefix}_{key}_document: {summary.records} records = {counts.documents} documents "
            f"+ {counts.empty} empty + {summary.rejected} rejected; {counts.tokens} tokens"
        )
    if summary.rejected:
        print(f"rejected records are listed in {summary.rejects_path}")


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1 process is needed")
    # A scheduler ends jobs with SIGTERM; leaving by an exception removes the temporary files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        num_workers=arguments.workers,
        metadata_keys=tuple(arguments.metadata_keys),
        on_bad_record=arguments.on_bad_record,
    )
    report(preprocess(settings), settings.output_prefix)


if __name__ == "__main__":
    run_command(main)
