"""Ends of documents and special tokens: Megatron-LM's bytes, recorded, compared everywhere."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig, EvaluationConfig
from megatron_dwm.data.checks import check_data
from megatron_dwm.data.shares import ReadSteps
from megatron_dwm.data.special_tokens import has_special_tokens
from megatron_dwm.data.validation import EvaluationSet
from megatron_dwm.tokenizer import open_tokenizer

ONE = ReadSteps(steps=range(1), samples_each=1)
Run = Callable[..., subprocess.CompletedProcess[str]]
BEGIN, END, OTHER = "<|begin|>", "<|end|>", "<|other|>"
SEQUENCES = ["A first part. ", "", "And a second one.", " "]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    """A byte-level tokenizer that puts a beginning before each text, as Llama 3's."""
    texts = (corpus_dir / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END, BEGIN, OTHER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)]
    )
    directory = tmp_path_factory.mktemp("llama")
    tokenizer.save(str(directory / "tokenizer.json"))
    name_end(directory, END)
    return directory


def name_end(directory: Path, end: str) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def other(llama: Path, tmp_path: Path) -> Path:
    """The same tokenizer.json beside another `eos_token`."""
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    return name_end(directory, OTHER)


@pytest.fixture
def source(tmp_path: Path, corpus_dir: Path) -> Path:
    """Texts, an empty one, and documents of several sequences or none."""
    lines = (corpus_dir / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    texts = [json.loads(line)["text"] for line in lines]
    texts[3:3] = ["", SEQUENCES, [], [""], ["one"], SEQUENCES * 3]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(source: Path, prefix: Path, tokenizer: Path, *more: str) -> list[str | Path]:
    kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "SentencePieceTokenizer"
    return [
        *("preprocess_data.py", "--input", source, "--output-prefix", prefix, "--append-eod"),
        *("--tokenizer-type", kind, "--tokenizer-model", tokenizer, *more),
    ]


def megatron_bytes(
    source: Path, prefix: Path, tokenize: Callable[[str], list[int]], end: int, vocab_size: int
) -> None:
    """Megatron-LM's Encoder.encode (tools/preprocess_data.py), with Megatron-Core's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for line in source.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids, lengths = [], []
        for sentence in text if isinstance(text, list) else [text]:
            found = tokenize(sentence)
            if found:
                ids += found
                lengths.append(len(found))
        if ids:
            ids.append(end)
            lengths[-1] += 1
        builder.add_document(torch.tensor(ids, dtype=torch.int64), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("mode", ["default", "include", "no-include", "sentencepiece"])
def test_bytes_are_megatron_lms(
    tmp_path: Path, source: Path, llama: Path, model: Path, run: Run, mode: str
) -> None:
    if mode == "sentencepiece":
        ours = open_tokenizer(model)
        flags, tokenize, end, size = [], ours.encode, ours.eod_id, ours.vocab_size
    else:
        flags = [] if mode == "default" else [f"--tokenizer-hf-{mode}-special-tokens"]
        theirs = AutoTokenizer.from_pretrained(llama, local_files_only=True)
        end, size = 0, len(theirs)

        def tokenize(text: str) -> list[int]:  # HuggingFaceTokenizer.text_to_ids of d98e8a6
            if mode == "no-include":
                return theirs.convert_tokens_to_ids(theirs.tokenize(text))
            return theirs(text).input_ids

    tokenizer = model if mode == "sentencepiece" else llama
    megatron_bytes(source, tmp_path / "theirs", tokenize, end, size)
    result = run(*command(source, tmp_path / "ours", tokenizer, *flags))
    assert result.returncode == 0, result.stderr
    for suffix in ("bin", "idx"):
        ours_path = tmp_path / f"ours_text_document.{suffix}"
        assert ours_path.read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes(), suffix
    merged = run(
        *("merge_datasets.py", "--output-prefix", tmp_path / "merged"),
        *("--input", tmp_path / "ours_text_document"),
    )
    assert merged.returncode == 0, merged.stderr
    names = [f"{tmp_path}/{{}}{suffix}" for suffix in (".bin", ".idx")]
    for name in names:
        before, after = (Path(name.format(p)) for p in ("ours_text_document", "merged"))
        assert before.read_bytes() == after.read_bytes()
    tokens = pq.read_table(tmp_path / "ours_text_document.meta.parquet")["tokens"].to_numpy()
    assert tokens.sum() == (tmp_path / "ours_text_document.bin").stat().st_size // 2
    begins = np.fromfile(tmp_path / "ours_text_document.bin", np.uint16) == 1
    assert begins.any() == (mode in ("default", "include"))


@pytest.fixture
def made(tmp_path: Path, source: Path, llama: Path, run: Run) -> Path:
    """Prefix of a complete output."""
    assert run(*command(source, tmp_path / "a", llama)).returncode == 0
    return tmp_path / "a"


def test_resume_compares_ends_and_special_tokens(
    made: Path, source: Path, llama: Path, other: Path, run: Run
) -> None:
    for result, words in (
        (run(*command(source, made, other, "--resume")), "end-of-document id was 0 and is 2"),
        (
            run(
                *command(
                    source, made, llama, "--resume", "--tokenizer-hf-no-include-special-tokens"
                )
            ),
            "--tokenizer-hf-include-special-tokens (ids) was [1] before, [] after and is [] before",
        ),
    ):
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
    record = Path(f"{made}.preprocess.json")
    content = json.loads(record.read_text())
    del content["options"]["end-of-document id"]
    record.write_text(json.dumps(content))  # as an older version wrote it
    result = run(*command(source, made, llama, "--resume"))
    assert result.returncode == 0
    [warning] = result.stderr.splitlines()
    assert "does not say which id ends a document" in warning


@pytest.mark.usefixtures("made")
def test_merge_compares_ends_and_special_tokens(
    tmp_path: Path, source: Path, llama: Path, other: Path, run: Run
) -> None:
    def merge(*names: str) -> subprocess.CompletedProcess[str]:
        inputs = [tmp_path / f"{name}_text_document" for name in names]
        return run("merge_datasets.py", "--input", *inputs, "--output-prefix", tmp_path / "m")

    assert run(*command(source, tmp_path / "end", other)).returncode == 0
    plain = command(source, tmp_path / "plain", llama, "--tokenizer-hf-no-include-special-tokens")
    assert run(*plain).returncode == 0
    for name, words in (("end", "(eod_id)"), ("plain", "(special_tokens_before)")):
        result = merge("a", name)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
    forget(tmp_path / "plain_text_document.meta.parquet")
    assert run(*plain[:4], tmp_path / "new", *plain[5:]).returncode == 0
    result = merge("plain", "new")
    assert result.returncode == 0, result.stderr
    [warning] = result.stderr.splitlines()
    assert "the id that ends a document is not recorded" in warning
    assert b"eod_id" not in pq.read_schema(tmp_path / "m.meta.parquet").metadata


def forget(sidecar: Path) -> None:
    """Make `sidecar` one that an older version wrote."""
    table = pq.read_table(sidecar)
    kept = {
        k: v for k, v in table.schema.metadata.items() if b"special" not in k and k != b"eod_id"
    }
    pq.write_table(table.replace_schema_metadata(kept), sidecar)


def check(prefix: str, tokenizer: Path) -> None:
    config = DataConfig(train=[prefix], tokenizer=str(tokenizer), sequence_length=16)
    include = has_special_tokens(config)
    check_data(config, open_tokenizer(tokenizer, include_special_tokens=include), ONE)


def test_training_compares_ends_and_special_tokens(
    tmp_path: Path,
    made: Path,
    source: Path,
    llama: Path,
    other: Path,
    run: Run,
    capsys: pytest.CaptureFixture,
) -> None:
    prefix = f"{made}_text_document"
    check(prefix, llama)
    with pytest.raises(UserError, match="id 0 ends a document, but .* it is 2"):
        check(prefix, other)
    plain = f"{tmp_path}/plain_text_document"
    flag = "--tokenizer-hf-no-include-special-tokens"
    assert run(*command(source, tmp_path / "plain", llama, flag)).returncode == 0
    check(plain, llama)
    config = DataConfig(train=[plain, prefix], tokenizer=str(llama), sequence_length=16)
    tokenizer = open_tokenizer(llama, include_special_tokens=has_special_tokens(config))
    with pytest.raises(UserError, match=r"before the text none.* would be .*\[1\]"):
        check_data(config, tokenizer, ONE)
    assert capsys.readouterr().err == ""
    forget(Path(f"{plain}.meta.parquet"))
    check(plain, llama)
    [warning] = capsys.readouterr().err.splitlines()
    assert "does not say which id ends a document" in warning


def without_sidecar(prefix: str, folder: Path) -> str:
    """Copy a dataset as Megatron-LM writes it."""
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"data{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    return str(folder / "data")


def test_the_documents_of_megatrons_datasets_tell(
    tmp_path: Path,
    made: Path,
    source: Path,
    llama: Path,
    run: Run,
    capsys: pytest.CaptureFixture,
) -> None:
    flag = "--tokenizer-hf-no-include-special-tokens"
    assert run(*command(source, tmp_path / "plain", llama, flag)).returncode == 0
    whole = without_sidecar(f"{made}_text_document", tmp_path / "whole")
    plain = without_sidecar(f"{tmp_path}/plain_text_document", tmp_path / "bare")

    def found(*prefixes: str) -> bool:
        return has_special_tokens(DataConfig(train=list(prefixes), tokenizer=str(llama)))

    assert found(whole) and not found(plain) and not found(str(tmp_path / "no such"))
    assert found(whole, f"{made}_text_document") and not found(plain, plain)
    assert capsys.readouterr().err == ""
    assert found(whole, plain), "one of two has them"
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {plain}: 0% of its first 1000 documents have the special")
    assert warning.endswith("the target and held-out text are encoded with them")
    builder = IndexedDatasetBuilder(str(tmp_path / "mixed.bin"), dtype=DType.optimal_dtype(700))
    for ids in ([1, 5, 6, 0], [5, 6, 0], [7, 0]):
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "mixed.idx"))
    assert not found(str(tmp_path / "mixed")), "fewer than half; chunks of text begin anywhere"
    assert "33% of its first 1000 documents" in capsys.readouterr().err
    data = DataConfig(train=[whole], tokenizer=str(llama))
    assert not has_special_tokens(data, kept=False), "a resumed run goes on as it was"


def test_held_out_text_is_encoded_as_the_training_data(
    tmp_path: Path, made: Path, llama: Path
) -> None:
    path = tmp_path / "held.jsonl"
    texts = ["Some held-out text.", "", "More of it."]
    rows = [{"text": text, "domain": "x"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[f"{made}_text_document"], sequence_length=8, domain_key="domain")
    include = has_special_tokens(data)
    tokenizer = open_tokenizer(llama, include_special_tokens=include)
    held_out = EvaluationSet(EvaluationConfig(path=str(path)), data, tokenizer)
    [batch] = held_out.batches(held_out.num_rows)
    plain = open_tokenizer(llama)
    expected = [i for text in texts if text for i in (1, *plain.encode(text), 0)]
    row = [*batch.tokens_BS.flatten().tolist(), int(batch.labels_BS[-1, -1])]
    assert row[: len(expected)] == expected


def test_flags_of_special_tokens_that_mean_nothing(
    tmp_path: Path, source: Path, model: Path, run: Run
) -> None:
    place = tmp_path / "x"
    result = run(*command(source, place, model, "--tokenizer-hf-include-special-tokens"))
    assert result.returncode == 2 and "SentencePieceTokenizer has none" in result.stderr
    result = run(*command(source, place, model, "--tokenizer-hf-no-include-special-tokens"))
    assert result.returncode == 0, result.stderr
