"""Choose documents of an indexed dataset, up to a number of tokens, and write them as a new one."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.entry import quiet_upstream
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.sidecar_columns import UNKNOWN_DOMAIN

if TYPE_CHECKING:
    from megatron_dwm.selection.copy import Advance
    from megatron_dwm.selection.select import Outcome, ScoringMethod, Selection

_EPILOG = """
Documents keep their order; one without tokens is never chosen. Writes P.bin and P.idx, which
Megatron reads, P.meta.parquet with the rows of the chosen documents, and P.select.json: options,
and documents and tokens by domain before and after. At least --tokens are chosen, and less than one
document more (of each domain with --domain-shares). The same command again finds its output and
does nothing.
"""
_SHARES_TOLERANCE = 1e-6


def parse_arguments() -> argparse.Namespace:
    """Read the options of the command."""
    parser = OneLineParser(description=__doc__, epilog=_EPILOG)
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        method = methods.add_parser(
            name,
            help=text,
            description=f"{name}: {text}.",
            epilog=_EPILOG,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_common(method)
        return method

    add("random", "all documents with the same probability")
    dsir = add("dsir", "documents whose words are likely in a target text (Xie et al. 2023)")
    _add_draw(dsir, "log-weights are divided by it before they are drawn")
    _add_dsir(dsir)
    qurating = add("qurating", "exp(score / temperature) of a column (Wettig et al. 2024)")
    _add_draw(qurating, "standardized scores are divided by it before they are drawn")
    rater = add("rater", "exp(score / temperature) of a weighting model that a run trained")
    _add_draw(rater, "standardized scores are divided by it before they are drawn")
    _add_rater(rater)
    qurating.add_argument("--column", required=True, default=argparse.SUPPRESS, metavar="NAME",
        help="numeric column of the table; larger is better")  # fmt: skip
    qurating.add_argument("--lowest", action="store_true",
        help="smaller is better, as for loss and perplexity of score_data")  # fmt: skip
    return parser.parse_args()


def _add_draw(parser: argparse.ArgumentParser, temperature: str) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--top-k", action="store_true", help="take the best, without drawing")
    how.add_argument("--temperature", type=float, default=1.0, metavar="T", help=temperature)


def _add_dsir(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, default=argparse.SUPPRESS, metavar="FILE",
        help="JSON Lines with a `text` in each line (plain or compressed)")  # fmt: skip
    add("--tokenizer", required=True, default=argparse.SUPPRESS, metavar="M",
        help="the tokenizer that the data was made with, which decodes it")  # fmt: skip
    add("--min-words", type=int, default=100, metavar="N",
        help="shorter documents are never chosen, words")  # fmt: skip
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes that hash; the output is the same for any number")  # fmt: skip


def _add_rater(parser: argparse.ArgumentParser) -> None:
    scores = parser.add_mutually_exclusive_group(required=True)
    scores.add_argument("--rater", metavar="DIR", default=argparse.SUPPRESS,
        help="the weighting model, RUN/weighting/stage_K")  # fmt: skip
    scores.add_argument("--column", metavar="NAME", default=argparse.SUPPRESS,
        help="scores that are in the table already "
        f"({name_of_command('score')} --columns weight)")  # fmt: skip
    parser.add_argument("--model", metavar="DIR",
        help="checkpoint of the run, for a rater with weighting.encoder llm")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=argparse.SUPPRESS,
        help="precision of the models (default: fp32)")  # fmt: skip


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, default=argparse.SUPPRESS, metavar="PREFIX",
        help="dataset to choose from, without or with .idx (data/my_text_document)")  # fmt: skip
    add("--output-prefix", required=True, default=argparse.SUPPRESS, metavar="P",
        help="writes P.bin, P.idx, P.meta.parquet and P.select.json")  # fmt: skip
    add("--tokens", type=int, required=True, default=argparse.SUPPRESS, metavar="N",
        help="budget, tokens")  # fmt: skip
    add("--seed", type=int, default=1234, metavar="N", help="seed of the draw")
    add(
        "--domain-shares",
        nargs="+",
        metavar="DOMAIN=F",
        help="part of the budget of each domain; they add up to 1 and other domains get nothing",
    )
    add(
        "--domain-key",
        metavar="COLUMN",
        help="column of the table that names a document's domain; empty takes "
        "meta.redpajama_set_name, as training does, if there is one",
    )


def shares_of(entries: list[str] | None) -> dict[str, float] | None:
    """Domains and their shares. Raises `UserError` unless the shares are positive and add to 1."""
    if entries is None:
        return None
    shares: dict[str, float] = {}
    for entry in entries:
        name, _, share = entry.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not name or not 0 < value <= 1:
            raise UserError(f"--domain-shares {entry}: expected DOMAIN=F with F above 0, at most 1")
        if name in shares:
            raise UserError(f"--domain-shares: {name} is named twice")
        shares[name] = value
    total = math.fsum(shares.values())
    if abs(total - 1) > _SHARES_TOLERANCE:
        raise UserError(f"--domain-shares: the shares add up to {total:g}; expected 1")
    return shares


def selection_of(arguments: argparse.Namespace) -> Selection:
    """What the options ask for. Raises `UserError` for an impossible number."""
    from megatron_dwm.config.schema import DataConfig
    from megatron_dwm.selection.choice import Draw
    from megatron_dwm.selection.select import Selection

    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens}: expected 1 or more")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: expected 0 or more")
    temperature = vars(arguments).get("temperature", 1.0)
    if not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected more than 0; or pass --top-k")
    return Selection(
        input_prefix=arguments.input,
        output_prefix=arguments.output_prefix,
        draw=Draw(
            tokens=arguments.tokens,
            seed=arguments.seed,
            temperature=temperature,
            top_k=vars(arguments).get("top_k", False),
            shares=shares_of(arguments.domain_shares),
        ),
        domain_key=arguments.domain_key or DataConfig().domain_key,
        names_domain_key=arguments.domain_key is not None,
    )


def method_of(arguments: argparse.Namespace) -> ScoringMethod:
    """The method that is asked for. Raises `UserError` for an impossible number."""
    from megatron_dwm.selection.dsir import DsirScores
    from megatron_dwm.selection.qurating import QuRatingScores
    from megatron_dwm.selection.uniform import UniformScores

    if arguments.method == "random":
        return UniformScores()
    if arguments.method == "qurating":
        return QuRatingScores(column=arguments.column, lowest=arguments.lowest)
    if arguments.method == "rater":
        return _rater_scores(arguments)
    for option, value in (("--min-words", arguments.min_words), ("--workers", arguments.workers)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    return DsirScores(
        target=arguments.target,
        tokenizer=arguments.tokenizer,
        min_words=arguments.min_words,
        num_workers=arguments.workers,
    )


def _rater_scores(arguments: argparse.Namespace) -> ScoringMethod:
    if "column" in arguments:
        from megatron_dwm.selection.qurating import QuRatingScores

        for option, is_given in (
            ("--model", arguments.model is not None),
            ("--precision", "precision" in arguments),
        ):
            if is_given:
                raise UserError(f"{option}: has no effect with --column; leave it out")
        return QuRatingScores(column=arguments.column, name="rater")
    quiet_upstream()
    from megatron_dwm.selection.rater import RaterScores

    return RaterScores(
        rater=arguments.rater,
        model=arguments.model,
        precision=vars(arguments).get("precision", "fp32"),
    )


@contextmanager
def progress(total_bytes: int) -> Iterator[Advance]:
    """Show progress over bytes of the input."""
    from megatron_dwm.preprocess.progress import progress_over

    with progress_over(total_bytes) as bar:
        yield bar.advance


def report(prefix: str, outcome: Outcome) -> None:
    """Print the totals, and a line for every domain."""
    if outcome.was_complete:
        print(f"{prefix}: complete already; nothing to do")
    total = outcome.record.total
    print(
        f"{prefix}: {total.chosen_documents} of {total.documents} documents, "
        f"{total.chosen_tokens} of {total.tokens} tokens"
    )
    for name, count in outcome.record.domains.items():
        before = 100 * count.tokens / max(total.tokens, 1)
        after = 100 * count.chosen_tokens / max(total.chosen_tokens, 1)
        print(
            f"  {name}: {count.chosen_documents} of {count.documents} documents, "
            f"{count.chosen_tokens} of {count.tokens} tokens; {before:.1f} % of all tokens before, "
            f"{after:.1f} % after"
        )
    if outcome.has_sidecar and set(outcome.record.domains) == {UNKNOWN_DOMAIN}:
        print("the table names no domains: --domain-key names the column with them")
    if not outcome.has_sidecar:
        print("the input has no .meta.parquet, so neither has the result")


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    # Imported after the arguments are read, so that --help answers at once.
    from megatron_dwm.selection.select import select

    outcome = select(selection_of(arguments), method_of(arguments), progress)
    report(arguments.output_prefix, outcome)


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
