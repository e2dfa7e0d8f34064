"""Runs in separate processes: held-out losses of a Hugging Face model in a parallel layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_dwm.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_dwm.data import EvaluationSet
from megatron_dwm.model import build_llm, forward_only
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.model.passes.objective import token_mean
from megatron_dwm.runtime import bring_up
from megatron_dwm.tokenizer import open_tokenizer
from megatron_dwm.training.optimizer import build_optimizer, build_scheduler
from megatron_dwm.training.step import evaluate
from tests.tiny import SAMPLES, Tiny
from tests.training.sessions import session_of

SEQUENCE_LENGTH = 64


def evaluation_set(text: str, tokenizer: str) -> EvaluationSet:
    """Returns held-out text as a run reads it."""
    data = DataConfig(sequence_length=SEQUENCE_LENGTH, domain_key="domain")
    return EvaluationSet(EvaluationConfig(path=text), data, open_tokenizer(tokenizer))


def held_out_losses(
    directory: str, tokenizer: str, text: str, parallel: dict
) -> tuple[dict[str, float], float]:
    """Losses by domain as a run reports them; and what the first eight rows' would be, were the
    vocabulary's padding counted, as it is in training.
    """
    source, layout = open_huggingface(Path(directory)), ParallelConfig(**parallel)
    training = TrainingConfig()
    with bring_up(layout, 1) as runtime:
        llm = build_llm(
            source.shape, ModelConfig(), layout, runtime, sequence_length=SEQUENCE_LENGTH, seed=3
        )
        load_huggingface(llm, source)
        optimizer = build_optimizer(training, llm, sharded=False)
        scheduler = build_scheduler(training, optimizer)
        subject = Tiny(runtime, llm, optimizer, scheduler, torch.ones(1))
        session = session_of(subject, 2, policy="uniform")
        held_out = evaluation_set(text, tokenizer)
        session = dataclasses.replace(session, evaluation=held_out)
        found = evaluate(session, lambda: None)
        padded = forward_only(llm, token_mean(next(iter(held_out.batches(SAMPLES))), 2))
        with_padding = float(padded.loss_sums_n.sum() / padded.token_counts_n.sum())
        return found, with_padding
