"""Bytes that a weighting update with the model's own encoder takes at most. Run as a process, which
alone has a peak of its own; its argument is a keyword dictionary of `configured`, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_dwm.config import Config
from megatron_dwm.data import Batch
from megatron_dwm.model import resolve_shape
from megatron_dwm.runtime import bring_up
from megatron_dwm.weighting import LearningPolicy, build_policy
from tests.planning.runs import configured


def _peak_of_update(config: Config) -> int:
    shape = resolve_shape(config.model)
    rows, length = config.training.global_batch_size, config.data.sequence_length
    tokens_BS = torch.randint(shape.vocab_size, (rows, length))
    batch = Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=torch.ones(rows, length),
        position_ids_BS=torch.arange(length).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_B=torch.arange(rows),
        domains=("d",) * rows,
    )
    with bring_up(config.parallel, seed=1) as runtime:
        before = _status_bytes("VmRSS")
        policy = build_policy(config, runtime, shape, shape.vocab_size)
        assert isinstance(policy, LearningPolicy)
        for _ in range(2):  # the first makes the optimiser's state
            policy.update(batch, None, torch.randn(rows), learning_rate=1.0)
        return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(_peak_of_update(configured(**json.loads(sys.argv[1]))))
