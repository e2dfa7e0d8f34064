"""Runs in separate processes: last words of a Hugging Face model in a parallel layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_dwm.config import DataConfig, EvaluationConfig, ModelConfig, ParallelConfig
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.model import build_llm
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.runtime import bring_up
from megatron_dwm.tokenizer import open_tokenizer
from megatron_dwm.training.last_words import last_word_scores

SEQUENCE_LENGTH = 256


def last_words(
    directory: str, tokenizer: str, text: str, parallel: dict
) -> dict[str, dict[str, float]]:
    """Returns the scores of every domain in the JSON Lines file `text`."""
    source = open_huggingface(Path(directory))
    data = DataConfig(sequence_length=SEQUENCE_LENGTH, domain_key="domain")
    words = LastWords(EvaluationConfig(path=text), data, open_tokenizer(tokenizer))
    layout = ParallelConfig(**parallel)
    with bring_up(layout, 1) as runtime:
        llm = build_llm(
            source.shape,
            ModelConfig(),
            layout,
            runtime,
            sequence_length=SEQUENCE_LENGTH,
            seed=3,
        )
        load_huggingface(llm, source)
        scores = last_word_scores(llm, words, batch_size=8, micro_batch_size=4)
    return {name: dataclasses.asdict(score) for name, score in scores.items()}
