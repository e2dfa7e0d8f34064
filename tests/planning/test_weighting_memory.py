"""The plan of the weighting model's own encoder against the encoder itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_dwm.data import Batch
from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.activations import Kernels, encoder_bytes
from megatron_dwm.planning.memory import stage_memory, weighting_parameters
from megatron_dwm.weighting import method_class
from megatron_dwm.weighting.encoder import TokenEncoder
from megatron_dwm.weighting.encoding import encode
from tests.launch import REPOSITORY
from tests.planning.runs import configured

LENGTH = 16


def _batch(rows: int) -> Batch:
    zeros_BS = torch.zeros(rows, LENGTH, dtype=torch.int64)
    return Batch(
        tokens_BS=zeros_BS,
        labels_BS=zeros_BS,
        loss_mask_BS=torch.ones(rows, LENGTH),
        position_ids_BS=torch.arange(LENGTH).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_U=torch.arange(rows),
        domains=("zeros",) * rows,
    )


def _kept(encoder: TokenEncoder, rows: int, *, bf16: bool) -> int:
    """Count the bytes of the tensors that autograd keeps of `rows` samples, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        encode(encoder, _batch(rows), rows, bf16=bf16)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(bf16: bool) -> None:
    width, heads, inner = 64, 4, 176
    for layers in (1, 3):
        encoder = TokenEncoder(100, width, layers, heads, inner)
        two, four = (_kept(encoder, rows, bf16=bf16) for rows in (2, 4))
        kernels = Kernels(value_bytes=2 if bf16 else 4, fused=False, on_cpu=True)
        expected = encoder_bytes(width, inner, heads, layers, kernels)
        # 8 more: the token's id. Copies of the weights in bf16 are there once.
        assert (four - two) / (2 * LENGTH) == pytest.approx(expected + 8, abs=1)


def test_peak_memory_of_an_update_on_a_cpu() -> None:
    """Six samples by twos: within 15 %. All at once they would take three times the activations,
    which are two fifths of the whole already. The libraries' own memory is at most 25 MB.
    """
    options: dict[str, Any] = {
        "model": {"precision": "bf16", "vocab_size": 2048},
        "weighting": {
            "encoder": "own",
            "hidden_size": 256,
            "num_layers": 6,
            "num_attention_heads": 8,
            "ffn_hidden_size": 704,
        },
        "policy": "dwm",
        "length": 512,
        "batch": 6,
    }
    child = subprocess.run(
        [sys.executable, "-m", "tests.planning.weighting_memory", json.dumps(options)],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    config = configured(**options)
    shape = resolve_shape(config.model)
    weighting = method_class(config).model_shape(config, shape)
    plan = stage_memory(config, shape, weighting, world_size=1, stage=0, on_gpu=False)
    expected = plan.weighting_model + plan.weighting_activations
    assert plan.weighting_activations > 0.4 * expected
    assert int(child.stdout.split()[-1]) == pytest.approx(expected, rel=0.15)


def test_a_frozen_model_is_only_its_parameters(tmp_path: Path) -> None:
    learned = configured(policy="dwm")
    shape = method_class(learned).model_shape(learned, resolve_shape(learned.model))
    frozen = configured(policy="dwm", weighting={"load": str(tmp_path), "frozen": True})
    held = [
        stage_memory(
            config, resolve_shape(config.model), shape, world_size=1, stage=0, on_gpu=True
        ).weighting_model
        for config in (learned, frozen)
    ]
    assert held == [24 * weighting_parameters(shape), 4 * weighting_parameters(shape)]
