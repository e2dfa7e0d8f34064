"""Every corpus and every selection of a study, made by the tools from a small text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from examples.study import texts
from examples.study.data import Data
from examples.study.study_file import read_study
from examples.study.workplace import Workplace
from megatron_dwm.tokenizer import open_tokenizer
from megatron_dwm.weighting.model import WeightingShape
from tests.scoring.test_rater import write_rater

RECORDS = 250


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The sample's targets, and a part of its text."""
    folder = tmp_path_factory.mktemp("study")
    texts.write_training_text(folder / "text.jsonl")
    lines = (folder / "text.jsonl").read_text().splitlines()
    every = len(lines) // RECORDS
    (folder / "text.jsonl").write_text("".join(f"{line}\n" for line in lines[::every]))
    made = Workplace(folder=folder, study=read_study())
    made.prepare()
    return made


def _data(place: Workplace, corpus: str, method: str) -> Data:
    return place.data(place.study.run("0.16M", corpus, "novels", method, 1))


def _documents(prefix: Path) -> list[int]:
    """The lengths of the documents."""
    return [len(ids) for ids in IndexedDataset(str(prefix))]


def test_corpora(place: Workplace) -> None:
    records = [json.loads(line) for line in (place.folder / "text.jsonl").open()]
    natural, junk, packed = (
        _data(place, corpus, "uniform").prepare() for corpus in ("natural", "junk", "packed")
    )
    assert len(_documents(natural)) == len(records) < len(_documents(junk))
    assert max(_documents(packed)) < max(_documents(junk)) / 2
    assert sum(_documents(packed)) == pytest.approx(sum(_documents(junk)), rel=0.1)
    assert _data(place, "continued", "uniform").prepare() == junk
    left = {file.suffix for folder in (junk, packed) for file in folder.parent.iterdir()}
    assert left == {".bin", ".idx", ".parquet", ".json"}, "no text is kept twice"


def test_selections_keep_half_of_the_tokens(place: Workplace) -> None:
    tokenizer = open_tokenizer(place.text.tokenizer)
    shape = WeightingShape(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=4,
        ffn_hidden_size=64,
        tokenizer_sha256=tokenizer.sha256,
    )
    rater = place.study.run("0.16M", "junk", "novels", "dwm_own_staged", 1)
    write_rater(place.directory(rater), shape)
    whole = _documents(_data(place, "junk", "uniform").prepare())
    longest, found = max(whole), set()
    for method in ("random_half", "dsir_half", "rater_half"):
        prefix = _data(place, "junk", method).prepare()
        kept = _documents(prefix)
        assert sum(whole) / 2 - 1 <= sum(kept) <= sum(whole) / 2 + longest
        found.add(prefix.with_suffix(".bin").read_bytes())
    assert len(found) == 3
