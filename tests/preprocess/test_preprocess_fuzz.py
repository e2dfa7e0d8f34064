"""Any mixture of records: what comes out is what the standard library and sentencepiece say."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.tokenizer import build_tokenizer

MAX_RECORD_BYTES = 300
TEXTS = st.text(max_size=60) | st.sampled_from(["", " ", "</s>", "<s> a </s>", "\u2581", "x" * 400])
VALUES = TEXTS | st.none() | st.integers() | st.floats() | st.lists(TEXTS, max_size=2)
RECORDS = (
    st.builds(lambda text: json.dumps({"text": text}).encode(), TEXTS)
    | st.builds(
        lambda text, n: json.dumps({"n": n, "text": text}, ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        ),
        TEXTS,
        VALUES,
    )
    | st.builds(lambda key, value: json.dumps({key: value}).encode(), TEXTS, VALUES)
    | st.builds(lambda value: json.dumps(value).encode(), VALUES)
    | st.binary(max_size=40).map(lambda data: data.replace(b"\n", b" "))
    | st.sampled_from([b"", b"  ", b"\r", b'{"text": "\\ud800"}', b'{"text": "a"', b"y" * 301])
)


def text_of(line: bytes) -> str | None:
    """The document in a line, as json alone sees it; None if it is no document."""
    if len(line) > MAX_RECORD_BYTES:
        return None
    try:
        text = json.loads(line.decode("utf-8"))["text"]
        text.encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(RECORDS, max_size=30),
    chunk_bytes=st.sampled_from([1, 7, 100, 1000, 100_000]),
    is_packed=st.booleans(),
    append_eod=st.booleans(),
)
def test_no_record_is_lost(
    model: Path, lines: list[bytes], chunk_bytes: int, is_packed: bool, append_eod: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        content = b"\n".join(lines)
        source = Path(directory) / ("in.jsonl.gz" if is_packed else "in.jsonl")
        source.write_bytes(gzip.compress(content) if is_packed else content)
        asked = PreprocessSettings(
            inputs=(str(source),),
            output_prefix=f"{directory}/p",
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(model),
            append_eod=append_eod,
            on_bad_record="skip",
            max_record_bytes=MAX_RECORD_BYTES,
            chunk_bytes=chunk_bytes,
        )
        numbered = [(i, line) for i, line in enumerate(lines) if line.strip()]
        texts = [(i, text_of(line)) for i, line in numbered]
        if not any(text for _, text in texts):
            try:
                preprocess(asked)
            except UserError as error:
                assert "rejected" in str(error) or "no document" in str(error)
                return
            raise AssertionError("a dataset of nothing was written")
        check(asked, texts)


def check(asked: PreprocessSettings, texts: list[tuple[int, str | None]]) -> None:
    """The files of a run against `texts` by line, None for what is no document."""
    tokenizer = build_tokenizer("SentencePieceTokenizer", asked.tokenizer_model)
    summary = preprocess(asked)
    documents = [(i, text) for i, text in texts if text is not None]
    ids = [tokenizer.encode(text) for _, text in documents]
    if asked.append_eod:
        ids = [[*row, tokenizer.eod_id] if row else row for row in ids]
    counts = summary.datasets["text"]
    rejected = sum(summary.rejected.values())
    assert summary.records == len(texts) == counts.documents + counts.empty + rejected
    assert rejected == len(texts) - len(documents)
    stem = f"{asked.output_prefix}_text_document"
    assert np.fromfile(f"{stem}.bin", np.uint16).tolist() == [i for row in ids for i in row]
    table = pq.read_table(f"{stem}.meta.parquet")
    assert table["record"].to_pylist() == [i for i, _ in documents]
    assert table["tokens"].to_pylist() == [len(row) for row in ids]
    if rejected:
        listed = Path(f"{asked.output_prefix}.rejects.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(row) for row in listed.splitlines()]
        assert [row["line"] - 1 for row in rows] == [i for i, text in texts if text is None]
