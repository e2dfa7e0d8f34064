"""Exports of runs with Llama 3's kind of tokenizer: its own file, and begun documents."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.tokenizer import build_tokenizer, open_tokenizer
from tests.convert.test_run_exports import SIZES, Project, preprocessed

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def _trained(folder: Path, kind: str, name: str) -> Path:
    """Returns the checkpoint of a run of two steps on data of that tokenizer."""
    preprocessed(folder, kind, name)
    arguments = ("--run.dir", "run", "--data.train", "data_text_document", *SIZES)
    project = Project(directory=folder, arguments=(*arguments, "--data.tokenizer", name))
    assert "error" not in project.train(2)
    (folder / name).unlink()  # an export needs the checkpoint alone
    [checkpoint] = list_checkpoints(folder / "run")
    return checkpoint


def test_llama_3s_own_file(texts: list[str], tmp_path: Path) -> None:
    """Bytes and a few merges, as that file has them."""
    tokens = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the"]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (tmp_path / "llama3.model").write_bytes(b"".join(lines))
    tokenizer = build_tokenizer("TikTokenizer", tmp_path / "llama3.model")
    checkpoint = _trained(tmp_path, "TikTokenizer", "llama3.model")
    assert (checkpoint / "tokenizer/tokenizer.model").read_bytes() == b"".join(lines)
    export_to_huggingface(checkpoint, tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts[:20]:
        assert exported(text).input_ids == tokenizer.encode(text)
    # Checkpoints of earlier versions have the tokenizer.json that is made of it, under this name.
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.content)
    older = open_tokenizer(tmp_path / "tokenizer.model")
    assert older.encode(texts[0]) == tokenizer.encode(texts[0])
    assert (older.eod_id, older.vocab_size) == (tokenizer.eod_id, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def begun(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose training data has the beginning that tokenizer.json puts before a text."""
    folder = tmp_path_factory.mktemp("begun")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BEGIN, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    bpe.save(str(folder / "tokenizer.json"))
    return _trained(folder, "HuggingFaceTokenizer", "tokenizer.json")


def test_the_beginning_of_every_document(begun: Path, texts: list[str], tmp_path: Path) -> None:
    around = json.loads((begun / "tokenizer/around_text.json").read_text())
    assert around == {"before": [0], "after": []}
    export_to_huggingface(begun, tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    for text in texts[:20]:
        ids = exported(text).input_ids
        assert ids[0] == 0 == exported.bos_token_id
        assert exported.decode(ids, skip_special_tokens=True) == text
