"""Bytes against Megatron-LM's, and the sidecar against Megatron-Core's reader."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_dwm.preprocess.encode.encoder import token_dtype
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.tokenizer import build_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset


def write_jsonl(path: Path, rows: list[object]) -> Path:
    """`rows` as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_for(
    inputs: list[Path], prefix: Path, model: Path, **more: object
) -> PreprocessSettings:
    """Settings with a SentencePiece tokenizer."""
    return PreprocessSettings(
        inputs=tuple(map(str, inputs)),
        output_prefix=str(prefix),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        **more,
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_golden_bytes_for_any_number_of_workers(
    tmp_path: Path, golden_dir: Path, golden_model: Path, num_workers: int
) -> None:
    settings = settings_for(
        [golden_dir / "input.jsonl"],
        tmp_path / "ours",
        golden_model,
        append_eod=True,
        num_workers=num_workers,
        metadata_keys=("meta.redpajama_set_name",),
    )
    summary = preprocess(settings)
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"ours_text_document.{suffix}").read_bytes()
        assert ours == (golden_dir / f"golden_text_document.{suffix}").read_bytes()
    assert (summary.records, summary.datasets["text"].empty) == (312, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ours.preprocess.json",
        "ours_text_document.bin",
        "ours_text_document.idx",
        "ours_text_document.meta.parquet",
    ]


def test_many_batches_in_order_whatever_the_workers(
    tmp_path: Path, corpus_dir: Path, model: Path
) -> None:
    inputs = []
    for number in range(3):  # a file is read once, so copies of it stand for many
        for name in ("validation.jsonl", "heldout.jsonl"):
            inputs.append(tmp_path / f"{number}_{name}")
            shutil.copy(corpus_dir / name, inputs[-1])
    for workers in (1, 2):
        preprocess(settings_for(inputs, tmp_path / f"w{workers}", model, num_workers=workers))
    for suffix in ("bin", "idx", "meta.parquet"):
        one, two = (tmp_path / f"w{workers}_text_document.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_sidecar_agrees_with_the_index(
    tmp_path: Path, golden_dir: Path, golden_model: Path
) -> None:
    source = golden_dir / "input.jsonl"
    keys = ("meta.redpajama_set_name", "source")
    preprocess(
        settings_for([source], tmp_path / "p", golden_model, append_eod=True, metadata_keys=keys)
    )
    table = pq.read_table(tmp_path / "p_text_document.meta.parquet")
    dataset = IndexedDataset(str(tmp_path / "p_text_document"))
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    tokens = table["tokens"].to_numpy()
    # A row a document: document d has sequences document_indices[d] to [d + 1].
    boundaries = dataset.document_indices
    assert table.num_rows == len(boundaries) - 1 == len(rows)
    lengths = dataset.sequence_lengths
    per_document = [lengths[a:b].sum() for a, b in zip(boundaries, boundaries[1:], strict=False)]
    assert tokens.tolist() == per_document
    assert tokens[tokens > 0].tolist() == lengths.tolist()
    assert table["record"].to_pylist() == list(range(len(rows)))
    assert set(table["source_file"].to_pylist()) == {str(source)}
    names = [row["meta"]["redpajama_set_name"] for row in rows]
    assert table["meta.redpajama_set_name"].to_pylist() == names
    assert table["source"].to_pylist() == [row["source"] for row in rows]
    tokenizer = build_tokenizer("SentencePieceTokenizer", golden_model)
    assert table.schema.metadata == {
        b"tokenizer_kind": b"SentencePieceTokenizer",
        b"tokenizer_sha256": tokenizer.sha256.encode(),
        b"vocab_size": b"32000",
        b"append_eod": b"true",
        b"eod_id": b"2",
        b"special_tokens_before": b"",
        b"special_tokens_after": b"",
    }


def test_metadata_types(tmp_path: Path, model: Path) -> None:
    rows = [
        {
            "text": "a",
            "n": 1,
            "x": 1,
            "s": "7",
            "mix": 1,
            "big": 2**70,
            "o": {"k": [1]},
            "a.b": "q",
        },
        {"text": "b", "n": None, "x": 0.1, "s": "8", "mix": "one", "big": 3, "a": {"b": "p"}},
        {"text": "c", "n": -(2**63), "x": 1e300, "mix": True, "o": {"k": "v"}},
    ]
    keys = ("n", "x", "s", "mix", "big", "o.k", "a.b")
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    preprocess(settings_for([source], tmp_path / "p", model, metadata_keys=keys))
    columns = pq.read_table(tmp_path / "p_text_document.meta.parquet").to_pydict()
    assert columns["n"] == [1, None, -(2**63)]
    assert columns["x"] == [1.0, 0.1, 1e300]
    assert columns["s"] == ["7", "8", None]
    assert columns["mix"] == ["1", "one", "true"]
    assert columns["big"] == [str(2**70), "3", None]
    assert columns["o.k"] == ["[1]", None, "v"]
    assert columns["a.b"] == ["q", "p", None]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst"])
def test_every_compression_gives_the_same_ids(
    tmp_path: Path, corpus_dir: Path, model: Path, suffix: str
) -> None:
    content = (corpus_dir / "validation.jsonl").read_bytes()
    half = len(content) // 2  # two members or frames in one file, as `cat a.gz b.gz` makes
    zstd = zstandard.ZstdCompressor().compress
    pack = {
        "jsonl": bytes,
        "jsonl.gz": gzip.compress,
        "jsonl.bz2": bz2.compress,
        "jsonl.xz": lzma.compress,
        "jsonl.zst": zstd,
    }[suffix]
    source = tmp_path / f"in.{suffix}"
    source.write_bytes(pack(content[:half]) + pack(content[half:]))
    preprocess(settings_for([source], tmp_path / "p", model))
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    dataset = IndexedDataset(str(tmp_path / "p_text_document"))
    texts = [json.loads(line)["text"] for line in content.splitlines()]
    assert len(dataset) == len(texts)
    for ids, text in zip(dataset, texts, strict=False):
        assert ids.tolist() == tokenizer.encode(text)


def test_several_keys_give_datasets_that_line_up(tmp_path: Path, model: Path) -> None:
    rows = [{"text": f"text {i}", "title": "t" * i} for i in range(4)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    preprocess(
        settings_for([source], tmp_path / "p", model, json_keys=("text", "title"), append_eod=True)
    )
    text, title = (
        pq.read_table(tmp_path / f"p_{k}_document.meta.parquet") for k in ("text", "title")
    )
    assert text["record"].to_pylist() == title["record"].to_pylist() == [0, 1, 2, 3]
    assert title["tokens"].to_pylist()[0] == 0
    dataset = IndexedDataset(str(tmp_path / "p_title_document"))
    assert dataset.document_indices.tolist() == [0, 0, 1, 2, 3]
    assert all(dataset[i][-1] == 2 for i in range(3))


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n  \r\n{"text": "b"}')
    preprocess(settings_for([source], tmp_path / "p", model))
    table = pq.read_table(tmp_path / "p_text_document.meta.parquet")
    assert table["record"].to_pylist() == [0, 3]


@pytest.mark.parametrize("vocab_size", [300, 32000, 65499, 65500, 128256])
def test_token_type_is_megatron_cores(vocab_size: int) -> None:
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1
