"""Junk: how much, of what kinds, and the real text untouched."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.config.errors import UserError
from tools.example_data.junk import JUNK_DOMAINS, add_junk

Run = Callable[..., subprocess.CompletedProcess[str]]


def rows_of(path: Path) -> list[dict]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def size_bytes(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode("utf-8"))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_fraction_and_equal_parts(tmp_path: Path, corpus_dir: Path, fraction: float) -> None:
    output = tmp_path / "mixed.jsonl"
    add_junk(str(corpus_dir / "heldout.jsonl"), output, fraction=fraction, seed=1)
    sizes: Counter[str] = Counter()
    for row in rows_of(output):
        domain = row["domain"] if row["domain"] in JUNK_DOMAINS else "real"
        sizes[domain] += size_bytes(row["text"])
    assert sum(sizes.values()) - sizes["real"] == pytest.approx(
        fraction * sum(sizes.values()), rel=1e-4
    )
    assert len({sizes[domain] for domain in JUNK_DOMAINS}) == 1


def test_real_rows_are_all_there_and_mixed(tmp_path: Path, corpus_dir: Path) -> None:
    source, output = corpus_dir / "heldout.jsonl", tmp_path / "mixed.jsonl"
    add_junk(str(source), output, fraction=0.5, seed=1)
    is_real = [row["domain"] not in JUNK_DOMAINS for row in rows_of(output)]
    lines = output.read_bytes().splitlines()
    real = [line for line, real in zip(lines, is_real, strict=True) if real]
    assert sorted(real) == sorted(source.read_bytes().splitlines())
    changes = sum(a != b for a, b in zip(is_real, is_real[1:], strict=False))
    assert changes > len(is_real) / 5, "interleaved, not in blocks"


def test_kinds_are_what_they_are_called(tmp_path: Path, corpus_dir: Path) -> None:
    source, output = corpus_dir / "validation.jsonl", tmp_path / "mixed.jsonl"
    add_junk(str(source), output, fraction=0.5, seed=1)
    real = Counter(word for row in rows_of(source) for word in row["text"].split())
    words: dict[str, list[str]] = {domain: [] for domain in JUNK_DOMAINS}
    for row in rows_of(output):
        if row.get("domain") in JUNK_DOMAINS:
            assert row["meta"]["redpajama_set_name"] == JUNK_DOMAINS[row["domain"]]
            words[row["domain"]] += row["text"].split()[:-1]  # the last may be cut

    def share_of_the(domain: str) -> float:
        return words[domain].count("the") / len(words[domain])

    assert set(words["shuffled_words"]) | set(words["random_words"]) <= set(real)
    # Shuffling keeps the frequency of words; a uniform draw has each about as often.
    assert share_of_the("shuffled_words") == pytest.approx(real["the"] / real.total(), rel=0.5)
    assert share_of_the("random_words") < 0.005
    strange = [word for word in words["random_characters"] if word not in real]
    assert len(strange) > 0.5 * len(words["random_characters"])


def test_seed_decides(tmp_path: Path, corpus_dir: Path, run: Run, run_fresh: Run) -> None:
    source = corpus_dir / "validation.jsonl"
    outputs = []
    for name, seed, start in (("a", "1", run), ("b", "1", run_fresh), ("c", "2", run)):
        output = tmp_path / f"{name}.jsonl"
        result = start("add_junk.py", "--input", source, "--output", output, "--seed", seed)
        assert result.returncode == 0, result.stderr
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_mistakes(tmp_path: Path, corpus_dir: Path) -> None:
    source = str(corpus_dir / "validation.jsonl")
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="--fraction"):
            add_junk(source, tmp_path / "x.jsonl", fraction=fraction, seed=1)
    with pytest.raises(UserError, match=r"end its name with \.jsonl"):
        add_junk(source, tmp_path / "x.zst", fraction=0.5, seed=1)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no document has any words"):
        add_junk(str(empty), tmp_path / "x.jsonl", fraction=0.5, seed=1)
    with pytest.raises(UserError, match="exists"):
        add_junk(source, empty, fraction=0.5, seed=1)
    assert list(tmp_path.iterdir()) == [empty]
