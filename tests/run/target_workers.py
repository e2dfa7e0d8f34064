"""What the ranks of test_target.py run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import DataConfig, ValidationConfig
from megatron_dwm.data import CorpusSource, Feed, Share, ValidationSet
from megatron_dwm.data.batch import NO_ROW
from megatron_dwm.run.inputs import RunInputs
from megatron_dwm.run.remarks import remarks
from megatron_dwm.tokenizer import build_tokenizer
from megatron_dwm.weighting.costs import Workload, plain_costs
from tests.subjects import config_of
from tests.tiny import SAMPLES, tiny

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
        runtime = subject.runtime
        share = Share(
            replicas=runtime.data_size,
            replica=runtime.data_rank,
            micro_batch_size=micro_batch,
            micro_batches_multiple=subject.llm.micro_batches_multiple,
        )
        feed = Feed(
            CorpusSource(None, SAMPLES),  # type: ignore[arg-type]  # no training batch is read
            share,
            steps=0,
            device=runtime.device,
            target=validation,
            passages=SAMPLES,
        )
        found = []
        for number in range(3):
            ids = feed.validation(number, halves=True).sample_ids_B
            parts: list[list[list[int]]] = [[] for _ in range(subject.runtime.data_size)]
            mine = [ids[0::2].tolist(), ids[1::2].tolist()]
            assert len(mine[0]) == len(mine[1])
            dist.all_gather_object(parts, mine, group=subject.runtime.data_group)
            even, odd = (
                [row for part in parts for row in part[half] if row != NO_ROW] for half in (0, 1)
            )
            whole = validation.batch(number, feed.passages).sample_ids_B.tolist()
            found.append((whole, even, odd))
        return found


def said_of_a_step(flops: float) -> list[str]:
    """What is said at the start of a run whose step is of so many FLOPs."""
    with tiny(steps=0) as subject:
        config, shape = config_of(4, policy="uniform"), subject.llm.shape
        costs = replace(plain_costs(config, shape, Workload(replicas=1)), llm_step=flops)
        inputs = RunInputs(
            tokenizer=None,  # type: ignore[arg-type]  # nothing is read
            shape=shape,
            target=None,
            held_out=None,
        )
        return list(remarks(config, inputs, costs, subject.runtime, TrainState()))
