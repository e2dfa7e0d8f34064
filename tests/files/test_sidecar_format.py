"""A sidecar's schema, its facts, and which of them may differ."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.files.sidecar_format import (
    facts_that_differ,
    lacks_end,
    read_facts,
    sidecar_schema,
    special_tokens,
    spell_ids,
    write_row_groups,
)

FACTS = {"tokenizer_sha256": "ab", "eod_id": "2", "special_tokens_before": spell_ids([1, 7])}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.meta.parquet"
    schema = sidecar_schema([("meta.score", pa.float64())], FACTS)
    columns = {"source_file": ["a", "b"], "record": [0, 1], "tokens": [5, 0], "meta.score": [1, 2]}
    write_row_groups(path, schema, [pa.table(columns, schema=schema)])
    assert pq.read_table(path).to_pydict() == columns
    assert read_facts(path) == FACTS
    assert special_tokens(read_facts(path)) == ("1 7", "")
    path.write_text("no Parquet")
    with pytest.raises(ValueError, match="Parquet"):
        read_facts(path)


def test_facts_that_differ() -> None:
    older = {"tokenizer_sha256": "ab"}
    assert facts_that_differ(FACTS, FACTS) == []
    assert facts_that_differ(FACTS, {**FACTS, "eod_id": "3"}) == ["eod_id"]
    assert facts_that_differ(FACTS, older) == ["special_tokens_before"], "the end may be any"
    assert "eod_id" in facts_that_differ(FACTS, {}), "not made by our tools"


def test_which_sidecars_lack_an_end() -> None:
    kind = {"tokenizer_kind": "HuggingFaceTokenizer"}
    assert lacks_end(kind)
    assert not lacks_end({**kind, "eod_id": "2"})
    assert not lacks_end({"tokenizer_kind": "SentencePieceTokenizer"}), "its own file says it"
