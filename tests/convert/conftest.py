"""Checkpoints of tiny models under several layouts, and a small tokenizer, made once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Tokenizer

from megatron_dwm.checkpoint.manifest import Manifest, record_file, write_manifest
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer, train_sentencepiece
from tests.launch import REPOSITORY, run_ranks
from tests.own_environment import own_environment  # noqa: F401

VOCAB_SIZE = 1000  # padded to 1024
SEQUENCE_LENGTH = 96

_GROUPED = {"num_attention_heads": 4, "num_query_groups": 2}
_FULL = {"num_attention_heads": 4, "num_query_groups": 4}
_QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
_QWEN2 = {"add_qkv_bias": True}
_COMMON = {
    "hidden_size": 32,
    "num_layers": 2,
    "ffn_hidden_size": 48,
    "vocab_size": VOCAB_SIZE,
    "init_std": 0.08,
    "norm_epsilon": 1e-4,
    "rotary_base": 5000.0,
}
# name: (processes, layout, what differs of the model)
LAYOUTS: dict[str, tuple[int, dict, dict]] = {
    "single-tied-grouped": (1, {}, {"tied_embeddings": True, **_GROUPED}),
    "single-bf16-full": (1, {}, {"tied_embeddings": False, "precision": "bf16", **_FULL}),
    "tensor-untied-grouped": (2, {"tensor": 2}, {"tied_embeddings": False, **_GROUPED}),
    "tensor-tied-full": (2, {"tensor": 2}, {"tied_embeddings": True, **_FULL}),
    "pipeline-tied-grouped": (2, {"pipeline": 2}, {"tied_embeddings": True, **_GROUPED}),
    "tensor-head-norms": (2, {"tensor": 2}, {"tied_embeddings": True, **_GROUPED, **_QWEN3}),
    "pipeline-head-norms": (2, {"pipeline": 2}, {"tied_embeddings": False, **_FULL, **_QWEN3}),
    "tensor-bias": (2, {"tensor": 2}, {"tied_embeddings": False, **_GROUPED, **_QWEN2}),
    "single-bias": (1, {}, {"tied_embeddings": True, **_GROUPED, **_QWEN2}),
    "pipeline-untied-full": (2, {"pipeline": 2}, {"tied_embeddings": False, **_FULL}),
}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, and the logits of its model under the layout that saved it."""

    directory: Path
    tokens_BS: torch.Tensor
    logits_BSV: torch.Tensor


def make_run(source: Path, run_dir: Path, names: list[str]) -> list[Path]:
    """Returns a run with checkpoints, made from one checkpoint without a manifest."""
    folder = run_dir / "checkpoints"
    for name in names:
        shutil.copytree(source, folder / name)
        within = [f for f in (folder / name).rglob("*") if f.is_file()]
        files = {str(f.relative_to(folder / name)): record_file(f) for f in within}
        write_manifest(folder / name, Manifest(state=TrainState(), fingerprint={}, files=files))
    return [folder / name for name in names]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Returns real text from the sample corpus."""
    lines = (REPOSITORY / "examples/corpus/validation.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in lines.splitlines()]


@pytest.fixture(scope="session")
def small_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(texts, vocab_size=VOCAB_SIZE, output=model)
    return build_tokenizer("SentencePieceTokenizer", model)


@pytest.fixture(scope="session")
def qwen_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Returns one of Qwen's kind, which transformers takes for every Qwen2 model."""
    folder = tmp_path_factory.mktemp("qwen_tokenizer")
    trained = Qwen2Tokenizer().train_new_from_iterator(texts, VOCAB_SIZE, show_progress=False)
    trained.save_pretrained(folder)
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="session")
def checkpoints(
    small_tokenizer: Tokenizer,
    qwen_tokenizer: Tokenizer,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Saved]:
    """Returns checkpoints of all layouts; each world size starts its processes once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokens = small_tokenizer.encode(texts[0])[:SEQUENCE_LENGTH]

    def data(name: str) -> dict[str, Any]:
        tokenizer = qwen_tokenizer if "bias" in name else small_tokenizer
        return {"tokenizer": str(tokenizer.model_path), "sequence_length": SEQUENCE_LENGTH}

    saved: dict[str, Saved] = {}
    for world_size in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == world_size]
        cases = [
            {
                "directory": str(folder / name),
                "model": {**_COMMON, **LAYOUTS[name][2]},
                "data": data(name),
                "tokens": tokens,
                **LAYOUTS[name][1],
            }
            for name in names
        ]
        logits = run_ranks("tests.convert.workers:save", world_size, cases)
        for name, of_ranks in zip(names, logits, strict=True):
            saved[name] = Saved(
                directory=folder / name,
                tokens_BS=torch.tensor([tokens]),
                logits_BSV=of_ranks[-1],
            )
    return saved
