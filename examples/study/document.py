"""Writes the study's document from the runs that are finished; no figure in it is typed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.study.outcomes import outcomes
from examples.study.spec import Part
from examples.study.tables import cells_of, equal_tokens, equal_work
from examples.study.workplace import Workplace
from megatron_dwm.files.atomic import write_text

_PREDICTIONS = Path(__file__).parent / "predictions.md"
_HEAD = """# Every method, compared

Written by `bash examples/study/run.sh WORKDIR --output docs/study.md` from its own runs. Losses are
held-out losses in nats a token after the last step. A change is against `uniform` of the same seed,
which read the same data in the same order: its mean over the seeds and a 95 % interval (Student's t
of the paired differences), **bold** where the interval does not contain 0. FLOPs are by formula.
"""


def write_document(place: Workplace, parts: Sequence[Part], output: Path) -> Path:
    """Write the document; returns its path."""
    write_text(output, "\n".join([_HEAD, *_predictions(), *_sections(place, parts)]))
    return output


def _predictions() -> Iterator[str]:
    yield _PREDICTIONS.read_text(encoding="utf-8")


def _sections(place: Workplace, parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        found = outcomes(place, place.study.runs(part))
        yield f"## {part.name}: {part.about}\n"
        if not found:
            yield "No run of this part is finished.\n"
            continue
        for cell in cells_of(part):
            size, corpus, target = cell
            yield f"### {size}, corpus {corpus}, target {target}, at equal tokens\n"
            yield equal_tokens(place.study, part, cell, found)
            yield "### The same at equal FLOPs\n"
            yield equal_work(place.study, part, cell, found)
