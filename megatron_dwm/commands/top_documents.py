"""Print the documents that a run wanted most and least.

From weights/*.parquet of the run and the data that it was trained on. A document's weight is the
mean over the recorded rows of it, in proportion to their tokens; with samples as units a row is of
its main document. Where data or tokenizer have moved, documents have numbers instead of text.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.printing import printable

if TYPE_CHECKING:
    from megatron_dwm.report.documents import WantedDocument
    from megatron_dwm.report.run_documents import RunDocuments

_MEASURES = ("weight", "alignment", "credit")
_SIDES = ("both", "most", "least")
_TEXT_OF_A_LINE, _TEXT_OF_JSON = 72, 2000
_HEADINGS = ("rank", "document", "domain", "times", "weight", "alignment", "credit")


def main() -> None:
    """Print a table, or JSON Lines with --json."""
    arguments = _parser().parse_args()
    # It reads Parquet files, which --help does without.
    from megatron_dwm.report.documents import all_equal
    from megatron_dwm.report.run_documents import read_documents
    from megatron_dwm.report.runs import read_run

    found = read_documents(read_run(arguments.run_dir, arguments.run_dir.name))
    if found is None or not len(found.sums):
        raise UserError(
            f"{arguments.run_dir} has no weights of documents in weights/*.parquet: run with "
            "logging.weights_interval_steps above 0, or wait for the first checkpoint, with which "
            "they are written"
        )
    for note in found.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    characters = arguments.characters or (_TEXT_OF_JSON if arguments.json else _TEXT_OF_A_LINE)
    wanted, equal = [], False
    for stage in _stages(arguments.stage, found):
        documents = found.wanted(
            stage, arguments.count, characters, arguments.by, arguments.domain, arguments.min_times
        )
        if all_equal(documents, arguments.by):
            where = "the run" if stage is None else f"stage {stage}"
            line = (
                f"all documents of {where} have the same {arguments.by}, "
                f"{getattr(documents[0], arguments.by):.4g}: none is wanted more than another"
            )
            print(line, file=sys.stderr if arguments.json else sys.stdout)
            equal = True
        else:
            wanted += [each for each in documents if arguments.side in ("both", each.side)]
    if equal and not wanted:
        return
    if not wanted:
        raise UserError(
            f"no document has a recorded {arguments.by} in {arguments.min_times} or more rows; "
            "--by weight needs no updates, and a smaller --min-times takes more documents"
        )
    if arguments.json:
        _print_json(wanted, all_stages=arguments.stage is None)
    else:
        _print_table(wanted, all_stages=arguments.stage is None)


def _stages(chosen: str | None, found: RunDocuments) -> Sequence[int | None]:
    """Returns the stages to print; None is all of them as one."""
    stages = found.sums.stages
    if chosen is None:
        return [None]
    if chosen == "each":
        return stages
    if chosen.isdigit() and int(chosen) in stages:
        return [int(chosen)]
    known = ", ".join(map(str, stages))
    raise UserError(f"--stage {chosen}: no such stage; choose each, or one of {known}")


def _print_json(wanted: Sequence[WantedDocument], *, all_stages: bool) -> None:
    for document in wanted:
        record = asdict(document) | ({"stage": None} if all_stages else {})
        print(json.dumps(record, ensure_ascii=False))


def _print_table(wanted: Sequence[WantedDocument], *, all_stages: bool) -> None:
    """Print a table for each stage and side, no wider than the terminal."""
    columns = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 10_000
    groups: dict[tuple[int, str], list[WantedDocument]] = {}
    for document in wanted:
        groups.setdefault((document.stage if not all_stages else 0, document.side), []).append(
            document
        )
    for number, ((stage, side), documents) in enumerate(groups.items()):
        where = "the run" if all_stages else f"stage {stage}"
        print("\n" * (number > 0) + f"{side} wanted of {where}")
        for line in _lines(documents):
            print(line[:columns].rstrip())


def _lines(documents: Sequence[WantedDocument]) -> list[str]:
    rows = [_HEADINGS, *(_cells(document) for document in documents)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["text", *(_text_of(document) for document in documents)]
    return [
        "  ".join(
            cell.ljust(width) if heading == "domain" else cell.rjust(width)
            for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)
        )
        + f"  {text}"
        for row, text in zip(rows, texts, strict=True)
    ]


def _cells(document: WantedDocument) -> tuple[str, ...]:
    known = (document.alignment, document.credit)
    return (
        str(document.rank),
        str(document.document),
        printable(document.domain),
        str(document.rows),
        f"{document.weight:.3f}",
        *("-" if value is None else f"{value:.4g}" for value in known),
    )


def _text_of(document: WantedDocument) -> str:
    if document.text is None:
        return "(no text)"
    return printable(" ".join(document.text.split()))


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    add(
        "-n",
        "--count",
        metavar="N",
        type=_positive,
        default=10,
        help="documents on each side (default 10)",
    )
    add(
        "--by",
        choices=_MEASURES,
        default="weight",
        help="mean weight; mean alignment; or credit, the sum over recorded updates of learning "
        "rate x alignment (docs/report.md). Default: weight",
    )
    add(
        "--side",
        choices=_SIDES,
        default="both",
        help="the most wanted, the least, or both (default)",
    )
    add(
        "--stage",
        metavar="STAGE",
        help="number of one stage, or `each` for all in turn (default: the whole run as one)",
    )
    add("--domain", metavar="NAME", help="only documents of this domain (default: all)")
    add(
        "--min-times",
        metavar="N",
        type=_positive,
        default=1,
        help="only documents with at least as many recorded weights: a mean over one is noisy "
        "(default 1)",
    )
    add(
        "--characters",
        metavar="N",
        type=_positive,
        help=f"characters of each text (default {_TEXT_OF_A_LINE}; with --json {_TEXT_OF_JSON})",
    )
    add(
        "--json",
        action="store_true",
        help="print JSON Lines: stage (null: the whole run), side, rank, document, domain, source, "
        "record, rows, tokens, weight, alignment, credit, scores, text",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number from 1 on"


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
