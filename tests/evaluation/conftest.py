"""A random Llama with a training tokenizer, as an export writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer, train_sentencepiece
from tests.launch import REPOSITORY
from tests.own_environment import own_environment  # noqa: F401

VOCAB_SIZE = 1000


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = (REPOSITORY / "examples/corpus/validation.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(texts, vocab_size=VOCAB_SIZE, output=vocabulary)
    return build_tokenizer("SentencePieceTokenizer", vocabulary)


@pytest.fixture(scope="session")
def build_model(
    small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Returns a function that writes a Hugging Face directory with a context of so many tokens."""

    def build(context_tokens: int) -> Path:
        directory = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context_tokens,
            initializer_range=0.15,
            bos_token_id=2,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
        write_tokenizer_files(small_tokenizer, context_tokens, directory)
        return directory

    return build


@pytest.fixture(scope="session")
def model(build_model: Callable[[int], Path]) -> Path:
    """Returns a model whose context is long enough for every passage of the sample files."""
    return build_model(1024)
