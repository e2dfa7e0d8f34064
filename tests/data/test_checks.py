"""What users get wrong about training data: one line that names the file and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.checks import check_data
from megatron_dwm.data.prefixes import read_indexed_file
from megatron_dwm.data.shares import ReadSteps
from megatron_dwm.tokenizer import Tokenizer

SAMPLES = ReadSteps(steps=range(8), samples_each=8)


def _samples(count: int) -> ReadSteps:
    return ReadSteps(steps=range(count), samples_each=1)


def refused(config: DataConfig, tokenizer: Tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        check_data(config, tokenizer, SAMPLES)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_data_passes(corpus: str, two: list[str], shared: Path, tokenizer: Tokenizer) -> None:
    check_data(DataConfig(train=[corpus], sequence_length=96), tokenizer, SAMPLES)
    check_data(
        DataConfig(train=["1", two[0], "2.5", two[1]], sequence_length=96), tokenizer, SAMPLES
    )
    golden = str(shared / "megatron_golden" / "golden_text_document")
    check_data(DataConfig(train=[golden], sequence_length=96), tokenizer, SAMPLES)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train is empty"),
        (["0.3", "A", "0.7"], "3 entries with weights among them"),
        (["A", "0.3"], "'A 0.3' as a pair"),
        (["0.3", "A", "B", "C"], "'B C' as a pair"),
        (["0.3", "0.4"], "'0.3 0.4' as a pair"),
        (["0", "A", "1", "B"], "gives A the weight 0"),
        (["1", "A", "-2", "B"], "gives B the weight -2"),
        (["nan", "A", "1", "B"], "gives A the weight nan"),
        (["inf", "A", "1", "B"], "gives A the weight inf"),
    ],
)
def test_lists_that_are_no_blend(train: list[str], message: str, tokenizer: Tokenizer) -> None:
    assert message in refused(DataConfig(train=train), tokenizer)


def test_lists_that_are_blends() -> None:
    assert [p.prefix for p in parse_blend(["A", "B"])] == ["A", "B"]
    assert [p.weight for p in parse_blend(["3", "A", "1e-1", "B"])] == [3.0, 0.1]
    assert parse_blend(["A"])[0].weight is None
    [first, second] = parse_blend(["0.5", "A", "2", "B", "0.25", "A"])
    assert (first.prefix, first.weight, first.places) == ("A", 0.75, (0, 2))
    assert (second.prefix, second.weight, second.places) == ("B", 2.0, (1,))
    assert [part.places for part in parse_blend(["A", "B", "A"])] == [(0, 2), (1,)]
    [one] = parse_blend(["d/A", "./d/../d/A"])
    assert (one.prefix, one.places) == ("d/A", (0, 1)), "one prefix, spelled in two ways"


def test_missing_files_come_with_a_hint(corpus: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert "no file" in refused(DataConfig(train=[str(tmp_path / "none")]), tokenizer)
    for slip in (corpus + ".bin", corpus + ".idx", corpus.removesuffix("_text_document")):
        assert f"did you mean {corpus}?" in refused(DataConfig(train=[slip]), tokenizer)


def test_broken_index_files(corpus: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    index, tokens = Path(f"{corpus}.idx").read_bytes(), Path(f"{corpus}.bin").read_bytes()

    def message(index_bytes: bytes, token_bytes: bytes) -> str:
        (tmp_path / "p.idx").write_bytes(index_bytes)
        (tmp_path / "p.bin").write_bytes(token_bytes)
        return refused(DataConfig(train=[str(tmp_path / "p")], sequence_length=96), tokenizer)

    assert "p.idx is not a Megatron index" in message(b"", tokens)
    assert "p.idx is not a Megatron index" in message(b"PARQUET1" * 40, tokens)
    assert "version 9" in message(index[:9] + b"\x09" + index[10:], tokens)
    assert "of type float32" in message(index[:17] + b"\x07" + index[18:], tokens)
    assert "it was cut short" in message(index[:-40], tokens)
    assert "p.bin has" in message(index, tokens[:-2])


def test_sequence_longer_than_the_data(
    documents: list, tmp_path: Path, tokenizer: Tokenizer, indexed_writer: Callable[..., str]
) -> None:
    short = [d for d in documents if d.ids][:1]
    prefix = indexed_writer(tmp_path / "short", short)
    size = len(short[0].ids)
    check_data(DataConfig(train=[prefix], sequence_length=size - 1), tokenizer, SAMPLES)
    text = refused(DataConfig(train=[prefix], sequence_length=size), tokenizer)
    assert f"holds {size} tokens" in text and f"at least {size + 1}" in text
    nothing = indexed_writer(tmp_path / "nothing", [d for d in documents if not d.ids])
    assert "holds 0 tokens" in refused(DataConfig(train=[nothing]), tokenizer)
    assert "must be at least 1" in refused(DataConfig(train=[prefix], sequence_length=0), tokenizer)


def test_sidecar_of_another_run(
    documents: list,
    tmp_path: Path,
    tokenizer: Tokenizer,
    indexed_writer: Callable[..., str],
    sidecar_writer: Callable[..., None],
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:50])
    sidecar_writer(prefix, documents[:49], tokenizer)
    text = refused(DataConfig(train=[prefix], sequence_length=96), tokenizer)
    assert "p.meta.parquet has 49 rows but p.idx has 50 documents" in text
    Path(f"{prefix}.meta.parquet").write_bytes(b"no parquet at all")
    text = refused(DataConfig(train=[prefix], sequence_length=96), tokenizer)
    assert "p.meta.parquet is not a readable Parquet file" in text


def test_misspelled_domain_key(corpus: str, tokenizer: Tokenizer) -> None:
    config = DataConfig(train=[corpus], sequence_length=96, domain_key="meta.sett")
    text = refused(config, tokenizer)
    assert "no column meta.sett" in text and "it has meta.redpajama_set_name" in text


def test_a_domain_that_is_no_single_value_is_refused(
    documents: list, tmp_path: Path, tokenizer: Tokenizer, indexed_writer: Callable[..., str]
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:50])
    table = pa.table({"tokens": list(range(50)), "tags": [["a", "b"]] * 50})
    pq.write_table(table, f"{prefix}.meta.parquet")
    config = DataConfig(train=[prefix], sequence_length=96, domain_key="tags")
    text = refused(config, tokenizer)
    assert "column tags (data.domain_key) is list<" in text and "one value for each" in text


def test_sidecar_without_metadata_is_domain_unknown(
    documents: list, tmp_path: Path, tokenizer: Tokenizer, indexed_writer: Callable[..., str]
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:50])
    pq.write_table(pa.table({"tokens": list(range(50))}), f"{prefix}.meta.parquet")
    check_data(DataConfig(train=[prefix], sequence_length=96), tokenizer, SAMPLES)


@pytest.mark.parametrize("change", [{"tokenizer_sha256": "0" * 64}, {"vocab_size": "1000"}])
def test_other_tokenizer(
    documents: list,
    tmp_path: Path,
    tokenizer: Tokenizer,
    indexed_writer: Callable[..., str],
    sidecar_writer: Callable[..., None],
    change: dict[str, str],
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:50])
    sidecar_writer(prefix, documents[:50], tokenizer, **change)
    text = refused(DataConfig(train=[prefix], sequence_length=96), tokenizer)
    named = next(iter(change.values()))[:12]
    assert "p.meta.parquet" in text and named in text and str(tokenizer.model_path) in text


def test_token_ids_beyond_the_vocabulary(
    documents: list, tmp_path: Path, tokenizer: Tokenizer, indexed_writer: Callable[..., str]
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:50], np.int32)
    check_data(DataConfig(train=[prefix], sequence_length=96), tokenizer, SAMPLES)
    ids = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r+")
    ids[17] = size = tokenizer.vocab_size
    ids.flush()
    text = refused(DataConfig(train=[prefix], sequence_length=96), tokenizer)
    assert f"p.bin holds token id {size}" in text and f"has {size} pieces" in text


def test_a_run_that_would_read_the_same_without_end_is_refused(
    corpus: str, two: list[str], tokenizer: Tokenizer
) -> None:
    """A pass has an order of its own: 32,000 of them took a minute and a half without a line."""
    tokens = read_indexed_file(corpus).num_tokens
    length = (tokens - 1) // 2  # two samples in a pass
    long = DataConfig(train=[corpus], sequence_length=length)
    check_data(long, tokenizer, _samples(2000))
    with pytest.raises(UserError, match=f"2 samples of data.sequence_length {length}") as caught:
        check_data(long, tokenizer, _samples(8), _samples(32_000))
    assert "each 16000 times, expected at most 1000" in str(caught.value)
    with pytest.raises(UserError, match="needs at least .* more text"):
        check_data(DataConfig(train=[corpus], sequence_length=tokens), tokenizer, SAMPLES)
    # By the share of the samples that a part of a blend gets.
    in_pass = [read_indexed_file(prefix).samples_per_epoch(64) for prefix in two]
    blend = DataConfig(train=["999", two[0], "1", two[1]], sequence_length=64)
    check_data(blend, tokenizer, _samples(1000 * in_pass[0]), None)
    with pytest.raises(UserError, match=f"{two[0]}.bin: .* weight in data.train"):
        check_data(blend, tokenizer, _samples(1010 * in_pass[0]))


def test_borders_without_loss_need_documents_of_two_tokens(
    tmp_path: Path, corpus: str, tokenizer: Tokenizer
) -> None:
    """Otherwise nothing is left to train on: a loss of 0, or of NaN where documents are units."""
    prefix = str(tmp_path / "single")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(300):
        builder.add_document(torch.tensor([5]), [1])
    builder.finalize(f"{prefix}.idx")
    single = DataConfig(train=[prefix], sequence_length=4, border_loss=False)
    assert "data.border_loss false: no label would count" in refused(single, tokenizer)
    check_data(dataclasses.replace(single, border_loss=True), tokenizer, SAMPLES)
    check_data(dataclasses.replace(single, train=[prefix, corpus]), tokenizer, SAMPLES)
