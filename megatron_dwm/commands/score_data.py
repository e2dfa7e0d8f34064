"""Add columns to the table of an indexed dataset: text statistics, losses, a rater's scores."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.entry import quiet_upstream
from megatron_dwm.files.command_names import name_of_command

if TYPE_CHECKING:
    from megatron_dwm.selection.copy import Advance


def _epilog() -> str:
    return f"""
Columns with --tokenizer: length (characters); type_token_ratio (distinct words / words, in lower
case); symbol_share (characters that are neither white space, letters, digits nor _, / characters);
compression_ratio (bytes after zlib / bytes); mean_word_length (characters). Columns with --model:
loss (mean over a document's tokens but the first, nats per token); perplexity (its exponential). A
document is never read with another; one longer than --context-tokens is read in windows. Column
with --rater: weight (the logit that a weighting model of a run gives the document among others).
PREFIX.meta.parquet is replaced at once; its other columns keep their values.
{name_of_command("select")} qurating --column selects by them.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(
        description=__doc__,
        epilog=_epilog(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, default=argparse.SUPPRESS, metavar="PREFIX",
        help="dataset, without or with .idx (data/my_text_document)")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--columns", nargs="+", default=argparse.SUPPRESS, metavar="NAME",
        help="columns to add")  # fmt: skip
    what.add_argument("--token-losses", default=argparse.SUPPRESS, metavar="NAME",
        help="write PREFIX.NAME.losses, the loss of every token under --model, which "
        "policy.reference_losses NAME reads in training")  # fmt: skip
    add("--tokenizer", metavar="M",
        help="the tokenizer that the data was made with, which decodes it")  # fmt: skip
    add("--model", metavar="DIR",
        help="a language model: Hugging Face directory, checkpoint or run")  # fmt: skip
    add("--rater", metavar="DIR",
        help="a weighting model, RUN/weighting/stage_K; with weighting.encoder llm, --model names "
        "the checkpoint of its run")  # fmt: skip
    add("--precision", choices=("fp32", "bf16"), default=argparse.SUPPRESS,
        help="precision of the model or rater (default: fp32)")  # fmt: skip
    add("--context-tokens", type=int, metavar="N",
        help="longest window that a model reads, tokens; empty takes its own context")  # fmt: skip
    add(
        "--replace",
        action="store_true",
        help="give columns that are there new values, or write a file of losses again",
    )
    add("--workers", type=int, metavar="N",
        help="processes that measure statistics (empty: one a core); the output is the same for "
        "any number")  # fmt: skip
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
    for option, value in (
        ("--workers", arguments.workers),
        ("--context-tokens", arguments.context_tokens),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if "precision" in arguments and arguments.model is None and arguments.rater is None:
        raise UserError("--precision: has no effect without --model or --rater; leave it out")
    if arguments.workers is not None and arguments.tokenizer is None:
        raise UserError("--workers: has no effect without statistics of texts; leave it out")
    if arguments.context_tokens is not None and arguments.model is None:
        raise UserError("--context-tokens: has no effect without --model; leave it out")
    quiet_upstream()
    if "token_losses" in arguments:
        _token_losses(arguments)
    else:
        _columns(arguments)


def _columns(arguments: argparse.Namespace) -> None:
    # Imported after the arguments are read, so that --help answers at once.
    from megatron_dwm.selection.score import ScoreSettings, score

    settings = ScoreSettings(
        prefix=arguments.input,
        columns=tuple(arguments.columns),
        tokenizer=arguments.tokenizer,
        model=arguments.model,
        rater=arguments.rater,
        precision=vars(arguments).get("precision", "fp32"),
        context_tokens=arguments.context_tokens,
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        replaces=arguments.replace,
    )
    values = score(settings, progress)
    for name, column in values.items():
        if len(column):
            print(f"{name}: mean {column.mean():.4g}, {column.min():.4g} to {column.max():.4g}")


def _token_losses(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        raise UserError("--token-losses: needs --model")
    for option, value in (("--tokenizer", arguments.tokenizer), ("--rater", arguments.rater)):
        if value is not None:
            raise UserError(f"{option}: has no effect with --token-losses; leave it out")
    from megatron_dwm.selection.token_losses import write_token_losses

    header = write_token_losses(
        arguments.input,
        arguments.token_losses,
        arguments.model,
        progress,
        precision=vars(arguments).get("precision", "fp32"),
        context_tokens=arguments.context_tokens,
        replaces=arguments.replace,
    )
    digest = header.model_digest.split()[0]  # the number of bytes follows
    print(
        f"{arguments.input}: {header.num_tokens} losses under {header.model} "
        f"(digest {digest}), at most {header.context_tokens} tokens of context"
    )


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
