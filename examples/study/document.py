"""Writes the study's document from the known outcomes; no figure in it is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from examples.study.contrasts import UNIFORMS, Cell, Comparison, cells_of, loss_of
from examples.study.figures import changes, curves, weights
from examples.study.questions import (
    Questions,
    claims_table,
    decisions_table,
    multiple_tests,
    predictions_table,
    read_questions,
)
from examples.study.results import Results
from examples.study.spec import Part
from examples.study.tables import (
    NONE,
    by_size,
    domains_of,
    equal_tokens,
    equal_work,
    last_weight,
    legend,
    not_run,
    shown,
    signal_to_noise,
    trained,
    work_of,
)
from megatron_dwm.config import UserError
from megatron_dwm.files.atomic import write_bytes, write_text
from megatron_dwm.report.content import Figure
from megatron_dwm.report.images import png

_HERE = Path(__file__).parent
ADVICE = "when_not.md"
"""the page beside the document"""
TITLES = ("# Every method, compared", "# When not to use learned weights")
"""how the document, and the page beside it, begin"""
_TEXTS = {
    "unseen novels": "unseen",
    "the target's other half": "persuasion",
    "other domains": "others",
}
"""groups of questions.yaml by their words in tables and pictures"""
_AT_EVERY_SIZE = (
    "dwm_ahead",
    "similarity",
    "validation_mixing",
    "validation_mixing_low",
    "dwm_transferred",
)


@dataclass(frozen=True, kw_only=True)
class _Section:
    name: str
    about: str
    body: str


def write_document(results: Results, output: Path) -> list[Path]:
    """Write the document, its pictures and, on the sample corpus, the page of advice beside it.

    Returns the paths of the pages.
    """
    place = results.place
    found = Comparison(study=place.study, results=results)
    questions = read_questions()
    on_sample = place.on_sample and found.has_domains(
        name for group in questions.groups.values() for name in group
    )
    text = _page("study.md").render(
        on_sample=on_sample,
        scale=place.scale,
        claims=claims_table(questions, found),
        claims_together=multiple_tests(questions.claims, questions, found),
        predictions=predictions_table(questions, found),
        predictions_together=multiple_tests(questions.predictions, questions, found),
        decisions=decisions_table(questions, found),
        parts=list(_sections(found, questions, output)),
        sizes=by_size(found, _AT_EVERY_SIZE, questions.groups_of(_TEXTS)),
        legend=legend(found, _shown_methods(found)),
        commits=results.commits,
        missing=not_run(found),
        **_numbers(found, questions),
    )
    write_text(output, text)
    if not on_sample:
        return [output]
    advice = output.with_name(ADVICE)
    write_text(advice, _page(ADVICE).render(_numbers(found, questions)))
    return [output, advice]


def _page(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(f"{name}.j2")


def _numbers(found: Comparison, questions: Questions) -> dict[str, Callable[..., str]]:
    """Returns what the page of advice quotes numbers with: contrast or method, group of domains."""

    def contrast(words: str, group: str, at: float = 1.0) -> str:
        """at: after which part of the steps."""
        try:
            return shown(found.contrast(words, loss_of(questions.groups[group], at)), digits=2)
        except UserError:  # another study has other methods
            return NONE

    def at_equal_work(method: str, group: str, *, with_seeds: bool = False) -> str:
        domains = questions.groups[group]
        change = found.change_at_equal_work(found.first_cell, method, domains)
        return shown(change, digits=2) + (f" ({change.pairs})" if with_seeds and change else "")

    def work(name: str) -> str:
        try:
            return work_of(found, *found.named(name))
        except UserError:
            return NONE

    def seeds(words: str) -> str:
        try:
            change = found.contrast(words, loss_of(questions.groups["novels"]))
        except UserError:
            return NONE
        return str(change.pairs if change is not None else 0)

    return {
        "contrast": contrast,
        "change": lambda method, group: contrast(f"{method} - uniform", group),
        "at_equal_work": at_equal_work,
        "work": work,
        "signal_to_noise": lambda name: signal_to_noise(found, name),
        "last_weight": lambda method, domain: last_weight(found, method, domain),
        "seeds": seeds,
    }


def _shown_methods(found: Comparison) -> list[str]:
    """Returns the methods of all tables, in the order of the study's file."""
    cells = [(part, cell) for part in found.study.parts.values() for cell in cells_of(part)]
    there = {method for part, cell in cells for method in trained(found, part, cell)}
    return [method for method in found.study.methods if method in there]


def _sections(found: Comparison, questions: Questions, output: Path) -> Iterator[_Section]:
    for part in found.study.parts.values():
        blocks = [
            block
            for cell in cells_of(part)
            if len(trained(found, part, cell)) > 1
            for block in _blocks(found, questions, part, cell, output)
        ]
        if blocks:
            yield _Section(name=part.name, about=part.about, body="\n\n".join(blocks))


def _blocks(
    found: Comparison, questions: Questions, part: Part, cell: Cell, output: Path
) -> Iterator[str]:
    size, corpus, target = cell
    yield f"### {size}, corpus {corpus}, target {target}"
    if part is next(iter(found.study.parts.values())):
        for figure in _figures(found, questions, part, cell):
            picture = f"{output.stem}_{figure.id}.png"
            write_bytes(output.with_name(picture), png(figure))
            yield f"![{figure.title}]({picture})"
    yield "At equal tokens:"
    yield equal_tokens(found, part, cell).rstrip()
    if sum(bool(found.by_seed(cell, name)) for name in UNIFORMS) > 1:
        yield "The same at equal FLOPs (against uniform runs of other lengths):"
        yield equal_work(found, part, cell).rstrip()


def _figures(found: Comparison, questions: Questions, part: Part, cell: Cell) -> Iterator[Figure]:
    """Yields the pictures of the study's first part."""
    domains, texts = domains_of(found, cell), questions.groups_of(_TEXTS)
    if not found.has_domains(name for group in texts.values() for name in group):
        texts = {}
    chosen = [changes(found, part, cell, texts or {name: [name] for name in domains})]
    if texts:
        chosen.append(curves(found, part, cell, questions.groups["novels"]))
    chosen += [weights(found, part, cell, m) for m in part.methods if m.startswith("dwm")]
    yield from (figure for figure in chosen if figure is not None)
