"""Functions that the ranks run: held-out losses of a Hugging Face model in a parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dwm.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_dwm.data import EvaluationSet
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.model import forward_only
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.model.passes.objective import token_mean
from megatron_dwm.runtime import bring_up
from megatron_dwm.tokenizer import open_tokenizer
from megatron_dwm.training import build_learner
from megatron_dwm.training.evaluation import HeldOut, evaluate
from tests.tiny import SAMPLES

SEQUENCE_LENGTH = 64
DATA = DataConfig(sequence_length=SEQUENCE_LENGTH, domain_key="domain")


def evaluation_set(text: str, tokenizer: str) -> EvaluationSet:
    """Returns held-out text as a run reads it."""
    return EvaluationSet(EvaluationConfig(path=text), DATA, open_tokenizer(tokenizer))


def held_out_losses(
    directory: str, tokenizer: str, text: str, parallel: dict[str, Any]
) -> tuple[dict[str, float], float]:
    """Returns the losses by domain as a run reports them, and that of the first rows in training.

    The second counts the vocabulary's padding, as training does; the first do not.
    """
    source, layout = open_huggingface(Path(directory)), ParallelConfig(**parallel)
    held_out = HeldOut(
        rows=evaluation_set(text, tokenizer),
        last_words=LastWords(EvaluationConfig(path=text), DATA, open_tokenizer(tokenizer)),
    )
    with bring_up(layout, 1) as runtime:
        learner = build_learner(
            source.shape,
            ModelConfig(),
            layout,
            TrainingConfig(global_batch_size=SAMPLES, micro_batch_size=2),
            runtime,
            sequence_length=SEQUENCE_LENGTH,
            seed=3,
        )
        load_huggingface(learner.llm, source)
        found = evaluate(learner, held_out, batch_size=SAMPLES, between=lambda: None)
        first_rows = next(iter(held_out.rows.batches(SAMPLES)))
        padded = forward_only(learner.llm, token_mean(first_rows, 2))
        with_padding = float(padded.loss_sums_n.sum() / padded.token_counts_n.sum())
        return found.losses, with_padding
