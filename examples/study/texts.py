"""The study's text: what is trained on, what the targets are, and what is held out.

All of it is the sample corpus (examples/corpus). Two of its three novels, Emma and Mansfield Park,
are taken out of the training text. Passages of Emma, and of the first half of Persuasion, may be in
a target; Mansfield Park, Sense and Sensibility and the second half of Persuasion are only measured
on. Of the held-out passages of python, speeches and web every other one may be in a target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import zstandard

from megatron_dwm.files.atomic import new_file

CORPUS = Path(__file__).parent.parent / "corpus"
TARGETS = ("novel", "novels", "mixture", "last_word")
MIXTURE = ("python", "speeches", "web")
# Names that occur in one novel only.
_NOVELS = {
    "pride": ("Darcy", "Bennet", "Longbourn", "Bingley"),
    "emma": ("Knightley", "Weston", "Elton", "Woodhouse"),
    "mansfield": ("Crawford", "Bertram", "Fanny", "Rushworth"),
}
_PASSAGE_CHARACTERS = 2000
_PASSAGES = 40

Record = dict[str, Any]


def novel_of(text: str) -> str | None:
    """Returns the novel of a chapter by Austen, by the names in it; None if it has none."""
    counts = {novel: sum(map(text.count, names)) for novel, names in _NOVELS.items()}
    best = max(counts, key=lambda novel: counts[novel])
    return best if counts[best] else None


def write_training_text(output: Path) -> None:
    """Write the sample corpus without the two novels, JSON Lines."""
    with new_file(output) as partial, partial.open("w", encoding="utf-8") as file:
        for record in _training():
            if record["domain"] != "austen" or novel_of(record["text"]) == "pride":
                _write(file, record)


def write_target(target: str, output: Path) -> None:
    """Write the passages of a target, JSON Lines with a `text` in each line."""
    with new_file(output) as partial, partial.open("w", encoding="utf-8") as file:
        for text in _target_texts(target):
            _write(file, {"text": text})


def write_held_out(output: Path) -> None:
    """Write the held-out passages, the same for every target, with `text` and `domain`."""
    with new_file(output) as partial, partial.open("w", encoding="utf-8") as file:
        for domain, texts in _held_out().items():
            for text in texts:
                _write(file, {"text": text, "domain": domain})


def _target_texts(target: str) -> list[str]:
    persuasion = [record["text"] for record in _lines(CORPUS / "validation.jsonl")]
    if target in ("novel", "last_word"):
        return persuasion
    if target == "novels":
        return persuasion[: 2 * _PASSAGES : 2] + _passages("emma")
    domains = _by_domain()
    return [text for name in MIXTURE for text in domains[name][::2]]


def _held_out() -> dict[str, list[str]]:
    domains = _by_domain()
    pride = [text for text in domains["austen"] if novel_of(text) == "pride"]
    return {
        "persuasion": domains["target"],
        "sense_and_sensibility": domains["unseen_novel"],
        "mansfield_park": _passages("mansfield"),
        "pride_and_prejudice": pride,
        "github": domains["github"],
        **{name: domains[name][1::2] for name in MIXTURE},
    }


def _passages(novel: str) -> list[str]:
    """Returns evenly spaced passages of a novel in the training text, cut at the ends of lines."""
    chapters = [r["text"] for r in _training() if r["domain"] == "austen"]
    found = [
        passage for chapter in chapters if novel_of(chapter) == novel for passage in _cut(chapter)
    ]
    step = len(found) / _PASSAGES
    return [found[int(number * step)] for number in range(_PASSAGES)]


def _cut(text: str) -> Iterator[str]:
    passage = ""
    for paragraph in text.split("\n\n"):
        if passage and len(passage) + len(paragraph) > _PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    if passage:
        yield passage


def _by_domain() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for record in _lines(CORPUS / "heldout.jsonl"):
        found.setdefault(record["domain"], []).append(record["text"])
    return found


def _training() -> Iterator[Record]:
    with zstandard.open(CORPUS / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _lines(file: Path) -> Iterable[Record]:
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _write(file: TextIO, record: Record) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
