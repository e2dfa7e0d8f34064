"""Peak bytes of a weighting update with the model's own encoder.

Run as a process, because only a process has a peak of its own; its argument is a keyword dictionary
of `configured`, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_dwm.config import Config
from megatron_dwm.model import ForwardOutputs, resolve_shape
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import random_batch
from megatron_dwm.weighting import Alignments
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.model import build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
from tests.planning.runs import configured


def _peak_of_update(config: Config) -> int:
    shape = resolve_shape(config.model)
    rows, length = config.training.global_batch_size, config.data.sequence_length
    sizes = {"sequence_length": length, "vocab_size": shape.vocab_size}
    alignments = Alignments(values_n=torch.randn(rows), learning_rate=1.0)
    with bring_up(config.parallel, seed=1) as runtime:
        batch = random_batch(1, runtime, rows=rows, **sizes)
        before = _status_bytes("VmRSS")
        method = Dwm(
            WeightingTrainer(
                build_weighting_model(Dwm.model_shape(config, shape), seed=1),
                config.weighting,
                runtime,
                config.training.micro_batch_size,
                bf16=config.model.precision != "fp32",
            )
        )
        for _ in range(2):  # the first makes the optimizer's state
            method.update(batch, ForwardOutputs(losses_n=torch.ones(rows)), alignments)
        return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(_peak_of_update(configured(**json.loads(sys.argv[1]))))
