"""What the ranks of test_target.py run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_dwm.config import DataConfig, ValidationConfig
from megatron_dwm.data import ValidationSet
from megatron_dwm.data.batch import NO_ROW
from megatron_dwm.tokenizer import build_tokenizer
from megatron_dwm.training.remarks import remarks
from tests.tiny import tiny
from tests.training.sessions import session_of

# Of each batch: the rows of the global batch, those of its even half, those of its odd half.
Halves = list[tuple[list[int], list[int], list[int]]]


def halves(target: str, tokenizer: str, micro_batch: int, **layout: Any) -> Halves:
    """Rows of the target in three validation batches, as all replicas together have them."""
    with tiny(steps=0, **layout) as subject:
        validation = ValidationSet(
            ValidationConfig(path=target, loss_on="last_word"),
            DataConfig(sequence_length=16),
            build_tokenizer("SentencePieceTokenizer", tokenizer),
            seed=3,
        )
        session = replace(session_of(subject, micro_batch), validation=validation)
        found = []
        for number in range(3):
            ids = session.validation_batch(number, halves=True).sample_ids_B
            parts: list[list[list[int]]] = [[] for _ in range(subject.runtime.data_size)]
            mine = [ids[0::2].tolist(), ids[1::2].tolist()]
            assert len(mine[0]) == len(mine[1])
            dist.all_gather_object(parts, mine, group=subject.runtime.data_group)
            even, odd = (
                [row for part in parts for row in part[half] if row != NO_ROW] for half in (0, 1)
            )
            whole = validation.batch(number, session.passages).sample_ids_B.tolist()
            found.append((whole, even, odd))
        return found


def said_of_a_step(flops: float) -> list[str]:
    """What is said at the start of a run whose step is of so many FLOPs."""
    with tiny(steps=0) as subject:
        session = session_of(subject, 4)
        return list(remarks(replace(session, compute=replace(session.compute, llm_step=flops))))
